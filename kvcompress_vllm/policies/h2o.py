# SPDX-License-Identifier: Apache-2.0
"""H2O: heavy hitters, the keys with the highest accumulated attention.

https://arxiv.org/abs/2306.14048 (Zhang et al., NeurIPS 2023): the score of key j is the sum over
queries of the attention paid to it, not divided by how many could; each head keeps the heaviest and
the most recent.

Paper and code: the paper accumulates over all queries; this over every ``query_stride``-th of the
prompt and the last ``window`` before each compression of a generation; with ``query_stride=0`` over
the last ``window`` alone. It splits the budget evenly between heavy and recent keys; here
``recent`` is a number of tokens. For grouped queries the attention of the group is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class H2O(Policy):
    """Attention summed over observed queries and group."""

    channels = (ops.SUM,)
    observes_all = True
    defaults = Defaults("uniform", window=64, pool=15, query_stride=32)

    def score(self, evidence: Evidence) -> Tensor:
        return self.pooled(evidence, evidence.statistics[ops.SUM])
