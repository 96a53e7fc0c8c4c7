# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: keep the keys that differ most from the average direction.

https://arxiv.org/abs/2504.15364 (Park et al., 2025): ``-cos(k_j, mean over i of k_i / |k_i|)``,
over all keys of the head. It looks at no query, so it does not depend on the question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine to the mean direction; one layer of keys at a time."""

    needs_keys = True
    defaults = Defaults("uniform", window=1, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        return self.pooled(evidence, unlikeness(evidence))


def unlikeness(evidence: Evidence) -> Tensor:
    """``[L * H, n]`` fp32: minus the cosine of each key to the mean direction of its head's."""
    assert evidence.keys is not None
    scores = []
    for layer in range(evidence.layers):
        keys = evidence.keys(layer)
        # Products in the dtype of the cache, summed up in fp32: a third of the memory traffic.
        # In fp16 neither the weight of an absent key nor the sum of 4 million may be infinite.
        norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).clamp(min=1e-4)
        anchor = (64 * norms).reciprocal().to(keys.dtype)[:, None] @ keys
        anchor = normalize(anchor.float(), dim=-1).to(keys.dtype)
        scores.append(-(keys @ anchor.mT).squeeze(-1).float() / norms)
    return torch.cat(scores)[:, : evidence.num_keys]
