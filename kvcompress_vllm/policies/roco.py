# SPDX-License-Identifier: Apache-2.0
"""RoCo: mean attention, evicting only among keys whose attention has settled.

https://arxiv.org/abs/2402.06262 (Ren and Zhu, 2024), code EasyKV. With ``a[q, j]`` the attention of
query q to key j, mean over the group, and n_j the queries that saw j:

    importance   M_j     = 1 / n_j * sum over q of a[q, j]
    robustness   sigma_j = sqrt(1 / n_j * sum over q of a[q, j]^2 - M_j^2)

The keys of highest sigma have not settled yet and leave the eviction scope; in the scope those of
lowest M go. Each (layer, KV head) has the same budget (allocator ``uniform``).

Paper and code: the size of the scope is ours to read off the code, where ``recent_ratio`` of the
budget is shielded by sigma (0.1 in its prefill, 0.3 fixed in its decode). Its shields (4 sinks, the
last 10 tokens) are ``sinks`` and ``recent`` here. Of the queries of the prompt every
``query_stride``-th is counted, of a generation the last ``window`` before each compression; with
``query_stride=0`` the last ``window`` alone. The group is averaged before the square, as in both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class RoCo(Policy):
    """Mean attention; the ``recent_ratio`` of the budget with the highest deviation is safe."""

    recent_ratio: float = option(
        0.1, "share of the kept keys that a high standard deviation protects", *number(0, 1)
    )

    channels = (ops.SUM, ops.MEAN_SQUARES)
    observes_all = True
    additive = False
    defaults = Defaults("uniform", window=64, pool=15, query_stride=32)

    def score(self, evidence: Evidence) -> Tensor:
        count = evidence.num_observations()
        mean = evidence.statistics[ops.SUM] / (evidence.group * count)
        # Rounding can leave a settled key below zero; ranking by variance ranks by deviation.
        variance = (evidence.statistics[ops.MEAN_SQUARES] / count - mean.square()).clamp(min=0)
        score = self.pooled(evidence, mean)
        protected = min(int(self.recent_ratio * evidence.num_kept), evidence.num_open)
        if protected == 0:
            return score
        unsettled = variance.masked_fill(evidence.shielded(), -1).topk(protected).indices
        # A mean is at most 1: one more puts a key above all that are in the scope.
        top = score.new_ones(1).expand(unsettled.shape)
        return score.scatter_add(1, unsettled, top)
