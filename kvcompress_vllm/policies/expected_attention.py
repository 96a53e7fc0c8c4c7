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

from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Expected attention times value norm; one layer of keys and values at a time."""

    epsilon: float = option(0.02, "attention that every key is granted", *number(0))

    needs_keys = True
    defaults = Defaults("layer", window=64, pool=127)

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.keys is not None
        assert evidence.values is not None and evidence.queries is not None
        scores = []
        first = evidence.first_columns() + evidence.num_sinks
        first = first.expand(evidence.layers * evidence.heads, 1)
        left_out = torch.arange(evidence.seq_len, device=evidence.device) < first
        for layer, hidden in enumerate(left_out.split(evidence.heads)):
            norms = torch.linalg.vector_norm(evidence.values(layer), dim=-1, dtype=torch.float32)
            keys, queries = evidence.keys(layer).float(), evidence.queries(layer).float()
            expected = _attention(keys, queries, evidence.scale, hidden)
            scores.append((expected + self.epsilon) * norms)
        return self.pooled(evidence, torch.cat(scores)[:, : evidence.num_keys])


def _attention(keys: Tensor, queries: Tensor, scale: float, left_out: Tensor) -> Tensor:
    """``[H, S]`` expected attention to keys ``[H, S, D]`` from queries ``[H, G, Q, D]``; 0 where
    ``left_out`` ``[H, S]``."""
    expected = keys.new_zeros(left_out.shape)
    for member in queries.unbind(1):  # one at a time: [H, Q, S] is no larger than the keys
        mean = member.mean(1, keepdim=True)
        # k Sigma k without Sigma: the mean over queries of (deviation . k)^2.
        spread = ((member - mean) @ keys.mT).square().mean(1)
        logits = scale * (mean @ keys.mT).squeeze(1) + scale**2 / 2 * spread
        expected += logits.masked_fill(left_out, float("-inf")).softmax(-1) / queries.shape[1]
    return expected
