# SPDX-License-Identifier: Apache-2.0
"""Expected Attention: the attention that future queries are expected to pay, times value norm.

https://arxiv.org/abs/2510.00636 (Devoto et al., 2025), section 2. If future queries of a query head
are normal with mean mu and covariance Sigma, a key's expected unnormalised attention is

    z_j = exp(mu . k_j / sqrt(D) + k_j . Sigma k_j / (2 D))

and with ``a`` its softmax-normalised form, mean over the group, the score is
``(a_j + epsilon) * |v_j|``.

Paper and code: the paper takes mu and Sigma of all context queries before RoPE and rotates them by
the average over the next 512 positions. The engine keeps queries after RoPE, so here the observed
window itself stands for future queries: rotations up to ``window`` back instead of up to 512 ahead,
and recent queries instead of all. Its authors combine it with head-adaptive budgets, hence
allocator ``layer``. As in kvpress, sinks are left out of the normalisation and Sigma divides by n.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm.policies.base import Defaults, Evidence, Policy
from kvcompress_vllm.validation import number, option


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Expected attention times value norm; one layer of keys and values at a time."""

    epsilon: float = option(0.02, "attention that every key is granted", *number(0))

    needs_keys = True
    defaults = Defaults("layer", window=64, pool=1)

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.keys is not None
        assert evidence.values is not None and evidence.queries is not None
        scores = []
        first = evidence.first_columns() + evidence.num_sinks
        first = first.expand(evidence.layers * evidence.heads, 1)
        for layer in range(evidence.layers):
            keys, queries = evidence.keys(layer), evidence.queries(layer)
            norms = torch.linalg.vector_norm(evidence.values(layer), dim=-1, dtype=torch.float32)
            for head in range(evidence.heads):
                left_out = torch.arange(evidence.seq_len, device=evidence.device)
                left_out = left_out < first[layer * evidence.heads + head]
                expected = _attention(
                    keys[head].float(), queries[head].float(), evidence.scale, left_out
                )
                scores.append((expected + self.epsilon) * norms[head])
        return self.pooled(evidence, torch.stack(scores)[:, : evidence.num_keys])


def _attention(keys: Tensor, queries: Tensor, scale: float, left_out: Tensor) -> Tensor:
    """``[S]`` expected attention to keys ``[S, D]`` from queries ``[G, Q, D]``; 0 if left out."""
    expected = keys.new_zeros(len(keys))
    for member in queries:
        mean = member.mean(0)
        # k Sigma k without Sigma: the mean over queries of (deviation . k)^2.
        spread = (keys @ (member - mean).T).square().mean(-1)
        logits = scale * (keys @ mean) + scale**2 / 2 * spread
        expected += logits.masked_fill(left_out, float("-inf")).softmax(-1) / len(queries)
    return expected
