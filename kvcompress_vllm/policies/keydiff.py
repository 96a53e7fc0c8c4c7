# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: keep the keys that differ most from the average direction.

https://arxiv.org/abs/2504.15364 (Park et al., 2025): ``-cos(k_j, mean over i of k_i / |k_i|)``,
over all keys of the head. It looks at no query, so it does not depend on the question.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine to the mean direction."""

    channels = (ops.LIKENESS,)
    defaults = Defaults("uniform", window=1, pool=7)

    def score(self, evidence: Evidence) -> Tensor:
        return self.pooled(evidence, -evidence.statistics[ops.LIKENESS])
