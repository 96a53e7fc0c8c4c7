# SPDX-License-Identifier: Apache-2.0
"""Scissorhands: drop the keys that the last queries most often gave little attention.

https://arxiv.org/abs/2305.17118 (Liu et al., NeurIPS 2023). Over the last 400 queries, key j
counts as low where its attention (here: mean over the query group) is below uniform, 1 / (keys that
the query sees). Keys with the highest low count go first; ties, which are many, by lower total
attention. Later layers get more: the paper finds that importance persists less there.

Paper and code: Algorithm 2 as printed adds and keeps the opposite of what its comments say; this
follows the intent. The paper gives no formula for the layers' shares; they grow linearly here, the
last layer getting ``later`` times as much as the first. Heads of a layer are equal (allocator
``uniform``). The released code is a masking simulation with another rule (top 10 % of the last 100
queries). Of the 400 every ``query_stride``-th is observed; counts go on over the compressions of a
generation. With ``query_stride=0`` the last ``window`` queries are counted instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Scissorhands(Policy):
    """Observed queries that did not find the key low, then mean attention."""

    later: float = option(
        2.0, "share of the last layer over that of the first", *number(0, above=True)
    )

    channels = (ops.SUM, ops.LOW_COUNT)
    observes_all = True
    history = 400
    defaults = Defaults("uniform", window=64, pool=127, query_stride=8)

    def score(self, evidence: Evidence) -> Tensor:
        # Counted from the top: most keys are low for every query, and near 0 fp32 has room for the
        # tie-break, a mean in [0, 1].
        not_low = evidence.num_queries - evidence.statistics[ops.LOW_COUNT]
        mean = evidence.statistics[ops.SUM] / (evidence.group * max(1, evidence.num_queries))
        return self.pooled(evidence, not_low + mean)

    def layer_shares(self, evidence: Evidence) -> Tensor:
        return torch.linspace(1.0, self.later, evidence.layers, device=evidence.device)
