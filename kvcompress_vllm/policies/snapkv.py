# SPDX-License-Identifier: Apache-2.0
"""SnapKV: pooled attention of the last queries to the keys before them.

https://arxiv.org/abs/2404.14469 (Li et al., 2024): ``C[j]`` is the sum over the last ``window``
queries of the attention to key j, pooled over neighbours; every head keeps the highest of them and
the window itself.

Paper and code: the code scores per query head and stores repeated keys; this takes the mean over
the query group, as kvpress does. The code's default pools by an average over 5, its experiments by
a maximum over 7; the default here is wider (docs/decisions/014).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import choice, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class SnapKV(Policy):
    """Mean attention of window and group, pooled over ``pool`` keys."""

    pooling: str = option("max", "how neighbouring scores are pooled", *choice("max", "average"))

    channels = (ops.SUM,)
    keeps_window = True
    defaults = Defaults("uniform", window=32, pool=127)

    def score(self, evidence: Evidence) -> Tensor:
        mean = evidence.statistics[ops.SUM] / (evidence.group * evidence.num_queries)
        return self.pooled(evidence, mean)
