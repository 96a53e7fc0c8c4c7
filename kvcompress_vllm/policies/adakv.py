# SPDX-License-Identifier: Apache-2.0
"""Ada-KV: SnapKV's scores; the heads of a layer share its budget by where its top keys are.

https://arxiv.org/abs/2407.11550 (Feng et al., NeurIPS 2025). All layers get the same. In a layer,
head h gets c_h, its number of keys among the layer's ``H * b`` highest scores (b: budget of a head
beyond the window), blended with the equal share as a safeguard: ``(1 - alpha) c_h + alpha b``.
This is allocator ``layer``; with ``uniform`` it is SnapKV.

Paper and code: alpha = 0.2 is the code's default; scores and pooling as in its SnapKV variant, with
the group averaged before pooling. kvpress' variant of the safeguard protects the top ``alpha b``
of each head and lets the rest compete instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV with head budgets that follow the scores, at least ``alpha`` of the average each."""

    alpha: float = option(
        0.2, "safeguard: part of the budget that heads share equally", *number(0, 1)
    )

    defaults = replace(SnapKV.defaults, allocator="layer")

    def head_shares(self, evidence: Evidence, scores: Tensor) -> Tensor | None:
        average = min(evidence.open_kept, evidence.num_open)
        if average <= 0:
            return None
        scores = scores.masked_fill(evidence.shielded(), float("-inf"))
        counts = _top_counts(scores.unflatten(0, (evidence.layers, -1)), evidence.heads * average)
        return (1 - self.alpha) * counts + self.alpha * average


def _top_counts(scores: Tensor, count: int) -> Tensor:
    """``[L, H]`` fp64: how many of the ``count`` highest of each layer of ``[L, H, n]`` a head has.

    Ties at the threshold go to the first heads.
    """
    highest = scores.flatten(1).topk(count, sorted=False).values
    threshold = highest.amin(-1)[:, None, None]
    above = (scores > threshold).sum(-1)
    tied = (scores == threshold).sum(-1)
    left = count - above.sum(-1, keepdim=True) - (tied.cumsum(-1) - tied)
    return (above + torch.minimum(left.clamp(min=0), tied)).double()
