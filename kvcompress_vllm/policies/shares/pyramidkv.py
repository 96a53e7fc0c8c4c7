# SPDX-License-Identifier: Apache-2.0
"""PyramidKV's layer shares: early layers keep more than late ones.

https://arxiv.org/abs/2406.02069; formula in ``policies/pyramidkv.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.shares.base import Shares


@dataclass(frozen=True)
class PyramidLayers(Shares):
    """Falling linearly."""

    beta: float = option(20.0, "average budget over that of the last layer", *number(1))

    def shares(self, evidence: Evidence, scores: Tensor | None = None) -> Tensor:
        average = float(max(1, evidence.open_kept))
        first = min(2 * average - average / self.beta, float(evidence.num_open))
        last = max(0.0, 2 * average - first)
        return torch.linspace(
            first, last, evidence.layers, dtype=torch.float32, device=evidence.device
        )
