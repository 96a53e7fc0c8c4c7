# SPDX-License-Identifier: Apache-2.0
"""Outliers: keep keys that get attention and whose values are unlike those around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_outliers.op import distances
from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Outliers(Policy):
    """Attention of the last queries, weighed by how unlike its neighbours' a key's value is."""

    weight: float = option(0.5, "how much being unlike the neighbours counts", *number(0))

    channels = (ops.SUM,)
    needs_keys = True  # of which it reads the values
    defaults = Defaults(allocator="global", window=16, pool=15)

    def score(self, evidence: Evidence) -> Tensor:
        """``[L * H, n]`` fp32, finite."""
        assert evidence.values is not None
        rows = []
        for layer in range(evidence.layers):  # one layer of values at a time is in memory
            values = evidence.values(layer)[:, : evidence.num_keys]
            rows.append(distances(values.float().contiguous(), 8))
        unlike = torch.cat(rows)
        unlike = unlike / unlike.mean(-1, keepdim=True).clamp(min=1e-12)
        return self.pooled(evidence, evidence.statistics[ops.SUM] * (1 + self.weight * unlike))
