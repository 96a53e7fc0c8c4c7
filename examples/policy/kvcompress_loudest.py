# SPDX-License-Identifier: Apache-2.0
"""Loudest: keep a key that any one of the last queries attends to, though the others do not."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Loudest(Policy):
    """Greatest attention of any observed query, and some of their mean; pooled over neighbours."""

    mean: float = option(0.5, "how much the mean attention counts beside the greatest", *number(0))

    channels = (ops.MAXIMUM, ops.SUM)
    defaults = Defaults(allocator="global", window=16, pool=15)

    def score(self, evidence: Evidence) -> Tensor:
        """``[L * H, n]`` fp32, finite."""
        observations = evidence.group * evidence.num_observations()
        mean = evidence.statistics[ops.SUM] / observations
        return self.pooled(evidence, evidence.statistics[ops.MAXIMUM] + self.mean * mean)
