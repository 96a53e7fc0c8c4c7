# SPDX-License-Identifier: Apache-2.0
"""KV-Compress: total squared attention of the last queries, max-pooled.

https://arxiv.org/abs/2410.00161 (Rehg, 2024). Equations 9 to 11 and 19: ``M[l, h, j]`` is the sum
of the squared attention probabilities that the last ``window`` prompt queries of all group members
pay to key j (L2 aggregation); L1 sums them unsquared. Equation 8 takes the maximum over
neighbouring keys, so that a token is kept together with its context. One threshold over all layers
and heads decides (allocator ``global``).

Paper and code: the code pools per query head and sums the group after; this follows the equations,
group sum first. ``aggregation: average`` divides by the number of observed queries that see the
key; the code has such a mode, the paper does not. The paper pools over 7 keys; the default is far
wider, because it keeps whole passages (docs/decisions/011).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import choice, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class KVCompress(Policy):
    """Squared attention over window and group, max-pooled over ``pool`` keys."""

    norm: str = option("L2", "sum squared (L2) or plain (L1) attention", *choice("L2", "L1"))
    aggregation: str = option(
        "sum", "sum over queries, or average over those that see the key", *choice("sum", "average")
    )

    defaults = Defaults("global", pool=127)

    def __post_init__(self) -> None:
        channel = ops.SUM_SQUARES if self.norm == "L2" else ops.SUM
        object.__setattr__(self, "channels", (channel,))

    def score(self, evidence: Evidence) -> Tensor:
        scores = evidence.statistics[self.channels[0]]
        if self.aggregation == "average":
            scores = scores / evidence.num_observations()
        return self.pooled(evidence, scores)
