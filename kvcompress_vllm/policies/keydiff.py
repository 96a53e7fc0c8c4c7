# SPDX-License-Identifier: Apache-2.0
"""KeyDiff: keep the keys that differ most from the average direction.

https://arxiv.org/abs/2504.15364 (Park et al., 2025): ``-cos(k_j, mean over i of k_i / |k_i|)``,
over all keys of the head. It looks at no query, so it does not depend on the question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Minus the cosine to the mean direction; one layer of keys at a time."""

    needs_keys = True
    defaults = Defaults("uniform", window=1, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.keys is not None
        scores = []
        for layer in range(evidence.layers):
            keys = evidence.keys(layer).float()
            anchor = normalize(keys, dim=-1).mean(1, keepdim=True)
            scores.append(-cosine_similarity(keys[:, : evidence.num_keys], anchor, dim=-1))
        return self.pooled(evidence, torch.cat(scores))
