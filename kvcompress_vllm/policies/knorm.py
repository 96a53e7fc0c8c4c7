# SPDX-License-Identifier: Apache-2.0
"""Knorm: keep the keys of smallest L2 norm.

https://arxiv.org/abs/2406.11430 (Devoto et al., EMNLP 2024) finds that keys of small norm get much
attention: the score is ``-|k_j|``. It looks at no query, so it does not depend on the question.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class KNorm(Policy):
    """Minus the norm of the key."""

    channels = (ops.NORM,)
    defaults = Defaults("uniform", window=1, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        return self.pooled(evidence, -evidence.statistics[ops.NORM])
