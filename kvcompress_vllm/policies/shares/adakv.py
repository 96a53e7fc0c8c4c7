# SPDX-License-Identifier: Apache-2.0
"""Ada-KV's head shares: by how many of a layer's highest scores a head has.

https://arxiv.org/abs/2407.11550; formula and safeguard in ``policies/adakv.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.shares.base import Shares


@dataclass(frozen=True)
class AdaHeads(Shares):
    """Heads of a layer by the scores, at least ``alpha`` of the average each."""

    alpha: float = option(
        0.2, "safeguard: part of the budget that heads share equally", *number(0, 1)
    )

    of_heads = True

    def shares(self, evidence: Evidence, scores: Tensor | None = None) -> Tensor | None:
        average = min(evidence.open_kept, evidence.num_open)
        if average <= 0 or scores is None:
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
