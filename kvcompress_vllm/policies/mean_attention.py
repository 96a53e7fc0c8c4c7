# SPDX-License-Identifier: Apache-2.0
"""Mean attention score (MAS): the average attention that a key got from the queries that saw it.

https://arxiv.org/abs/2402.06262 (Ren and Zhu, 2024) introduces it as the importance score of RoCo;
without RoCo's scope it is kvpress' ``observed_attention`` and OpenVINO's ``NORM_SUM``:
``M[j] = 1 / n_j * sum over q >= j of mean over g of p[q, g, j]``, n_j queries from position j on.

The paper counts all queries. This counts every ``query_stride``-th of the prompt, and the last
``window`` before each compression of a generation; with ``query_stride=0`` the last ``window``
alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class MeanAttention(Policy):
    """Attention per observed query that sees the key, mean over the group."""

    channels = (ops.SUM,)
    observes_all = True
    defaults = Defaults("uniform", window=64, pool=15, query_stride=32)

    def score(self, evidence: Evidence) -> Tensor:
        count = evidence.num_observations() * evidence.group
        return self.pooled(evidence, evidence.statistics[ops.SUM] / count)
