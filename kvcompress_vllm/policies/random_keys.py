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

from kvcompress_vllm.policies.base import Defaults, Evidence, Policy
from kvcompress_vllm.validation import integer, option

_LOW32 = 0xFFFFFFFF


@dataclass(frozen=True)
class RandomKeys(Policy):
    """Uniform in [0, 1). Neither ``window`` nor ``pool`` matters."""

    seed: int = option(0, "another seed, another choice", *integer(0, _LOW32))

    defaults = Defaults("uniform", window=1, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        base = int(_mix(torch.tensor(self.seed + 0x9E3779B9 * (evidence.seq_len + 1))))
        slot = torch.arange(evidence.layers * evidence.heads, device=evidence.device)
        start = _mix(base + 0x85EBCA77 * (slot + 1))
        position = torch.arange(evidence.num_keys, device=evidence.device)
        scores = torch.empty(len(slot), evidence.num_keys, device=evidence.device)
        for part in torch.arange(len(slot)).split(evidence.heads):  # 64-bit numbers take room
            # The upper 24 bits are exact in fp32.
            first = start[part[0] : part[-1] + 1, None]
            scores[part[0] : part[-1] + 1] = (_mix(first + 0x27D4EB2F * position) >> 8) * 2.0**-24
        return scores


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on the low 32 bits of an int64 tensor."""
    x = x & _LOW32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW32
    return x ^ (x >> 16)
