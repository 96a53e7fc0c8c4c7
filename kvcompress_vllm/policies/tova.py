# SPDX-License-Identifier: Apache-2.0
"""TOVA: the attention of the last query, averaged over all heads of a layer.

https://arxiv.org/abs/2401.06104 (Oren et al., 2024): token omission via attention. The same score
for every head of a layer, so all its heads keep the same tokens (allocator ``uniform``).

The paper drops one token per decoded token; this is its rule applied once, after prefill. With
tensor parallelism the average is over the heads of the rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Tova(Policy):
    """Attention of the last query, mean over the layer's heads."""

    channels = (ops.LAST,)
    defaults = Defaults("uniform", window=1, pool=127)

    def score(self, evidence: Evidence) -> Tensor:
        last = evidence.statistics[ops.LAST].unflatten(0, (evidence.layers, evidence.heads))
        mean = last.mean(1, keepdim=True) / evidence.group
        return self.pooled(evidence, mean.expand(last.shape).flatten(0, 1))
