# SPDX-License-Identifier: Apache-2.0
"""Random: a control. What is kept is chosen by a hash, so runs and ranks agree.

The score of a key hashes its position, its layer and head on the rank, the request's length and
``seed``: no random state is shared or advanced, and a preempted request keeps the same keys again
if it comes back with the same length. Ranks of tensor parallelism draw the same numbers for their
own heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import integer, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy

_LOW32 = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomKeys(Policy):
    """Uniform in [0, 1). Neither ``window`` nor ``pool`` matters."""

    seed: int = option(0, "another seed, another choice", *integer(0, _LOW32))

    defaults = Defaults("uniform", window=1, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        heads, device = evidence.layers * evidence.heads, evidence.device
        base = _mix(
            torch.tensor(
                _signed(self.seed + 0x9E3779B9 * (evidence.seq_len + 1)), dtype=torch.int32
            )
        )
        slot = torch.arange(1, heads + 1, dtype=torch.int32, device=device)
        start = _mix(slot * _signed(0x85EBCA77) + int(base))
        position = torch.arange(evidence.num_keys, dtype=torch.int32, device=device)
        mixed = _mix(start[:, None] + position * _signed(0x27D4EB2F))
        # The upper 24 bits are exact in fp32.
        return _shifted(mixed, 8) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on int32, whose products wrap around as those of uint32."""
    x = (x ^ _shifted(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _shifted(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` as of uint32."""
    shifted: Tensor = (x >> bits) & (2 ** (32 - bits) - 1)
    return shifted


def _signed(x: int) -> int:
    """The int32 with the low 32 bits of ``x``."""
    return (x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000
