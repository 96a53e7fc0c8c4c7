# SPDX-License-Identifier: Apache-2.0
"""PyramidKV: SnapKV's scores; early layers keep more than late ones.

https://arxiv.org/abs/2406.02069 (Cai et al., 2024). With b the average budget of a layer beyond the
window, the last layer gets ``b / beta`` and the first ``2 b - b / beta``; layers between them lie
on the line. Where the first layer has fewer keys than that, it keeps them all and the last gets ``2
b`` less that number, so the total stays. Heads of a layer are equal (allocator ``uniform``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with layer budgets falling linearly."""

    beta: float = option(20.0, "average budget over that of the last layer", *number(1))

    # Late layers have room for few passages.
    defaults = replace(SnapKV.defaults, pool=31)

    def layer_shares(self, evidence: Evidence) -> Tensor:
        average = float(max(1, evidence.open_kept))
        first = min(2 * average - average / self.beta, float(evidence.num_open))
        last = max(0.0, 2 * average - first)
        return torch.linspace(first, last, evidence.layers, device=evidence.device)
