# SPDX-License-Identifier: Apache-2.0
"""Diverse: what the last queries attend to, beside the keys that are least like the others.

Ours, of two published scores. The attention of KV-Compress (https://arxiv.org/abs/2410.00161) finds
what the end of the prompt asks for, and nothing else; KeyDiff (https://arxiv.org/abs/2504.15364)
looks at no query, and keeps a sample of everything that a prompt says. Here ``share`` of the keys
that a head keeps on average are those with the highest KeyDiff score, in every head alike; what is
left of the budget goes to pooled squared attention, by one threshold over all layers and heads.
Neither paper pools keys' scores; the default widths were found on a model that must copy passages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import WIDEST_POOL, integer, number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Diverse(Policy):
    """KV-Compress's attention; KeyDiff's first ``share`` of the budget is safe."""

    share: float = option(0.5, "part of the kept keys that KeyDiff chooses", *number(0, 1))
    key_pool: int = option(
        7,
        "as pool, for KeyDiff's scores: neighbours over which they are pooled",
        *integer(1, WIDEST_POOL, odd=True),
    )

    channels = (ops.SUM_SQUARES, ops.LIKENESS)
    additive = False
    defaults = Defaults("global", window=8, pool=127)

    def worth(self, evidence: Evidence) -> Tensor:
        """The attention, also of keys that KeyDiff chose."""
        return self.pooled(evidence, evidence.statistics[ops.SUM_SQUARES])

    def score(self, evidence: Evidence) -> Tensor:
        count = min(int(self.share * max(0, evidence.open_kept)), evidence.num_open)
        attention = self.worth(evidence)
        if count == 0:
            return attention
        unlike = -evidence.statistics[ops.LIKENESS]
        unlike = replace(self, pool=self.key_pool).pooled(evidence, unlike)
        chosen = _first(unlike.masked_fill_(evidence.shielded(), float("-inf")), count)
        # More than the attention of all observed queries: chosen keys come before all others.
        above = 2.0 * evidence.group * max(1, evidence.num_queries)
        return attention.add(chosen, alpha=above)


def _first(scores: Tensor, count: int) -> Tensor:
    """``[heads, n]`` bool: the ``count`` highest of every row of ``scores``.

    Pooled scores tie: the first of them, on every device. Without sorting whole rows, which takes
    longer than all else.
    """
    least = scores.topk(count, dim=1, sorted=False).values.amin(1, keepdim=True)
    higher, tied = scores > least, scores == least
    room = count - higher.sum(1, keepdim=True)
    return higher | (tied & (tied.cumsum(1, dtype=torch.int32) <= room))
