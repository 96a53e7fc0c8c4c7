# SPDX-License-Identifier: Apache-2.0
"""CAKE: mean and variance of attention over the window; layers share by their preference.

https://arxiv.org/abs/2503.12491 (Qin et al., ICLR 2025). On the attention A of the last ``window``
queries to all keys before the window:

    indicator     I[j] = pool(mean over i of A[i, j] + gamma * var over i of A[i, j])
    dispersion    H    = -sum over i, j of A[i, j] log A[i, j]       per layer, not renormalised
    shift         V    = sum over j of var over i of A[i, j]         per layer
    preference    P    = H^(1 / tau1) * V^(1 / tau2)

Layers share the budget in proportion to P; every head of a layer has the same part of it and keeps
the keys of highest I (allocator ``uniform``). The window is always kept. Variances are unbiased;
indicators are averaged over the query group; pooling is an average.

Paper and code: the code evaluates variances and P in the model's dtype, this in fp32. Its rounding
and clipping may leave budget unused; here shares are water-filled, so the total is exact. Evicting
layer by layer during prefill gives the same keys as at its end (the paper's theorem) and is left
out. tau1 and tau2 are tuned per model and budget in the code's ``model2tau.json``; 1 is its
fallback. H and V count candidates only: with a window shorter than a block, up to a block of keys
between candidates and window is missing from the sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Defaults, Evidence, Policy


@dataclass(frozen=True)
class Cake(Policy):
    """Mean plus ``gamma`` times variance; layer budgets from entropy and temporal variance."""

    gamma: float = option(200.0, "weight of the variance in the indicator", *number(0))
    tau1: float = option(
        1.0, "temperature of the entropy in a layer's share", *number(0, above=True)
    )
    tau2: float = option(
        1.0, "temperature of the variance in a layer's share", *number(0, above=True)
    )

    pooling: str = "average"

    channels = (ops.SUM, ops.SUM_SQUARES, ops.HEAD_SUM_SQUARES, ops.ENTROPY)
    keeps_window = True
    defaults = Defaults("uniform", window=32, pool=127)

    def score(self, evidence: Evidence) -> Tensor:
        mean = evidence.statistics[ops.SUM] / (evidence.group * evidence.num_queries)
        variance = _variances(evidence) / evidence.group
        return self.pooled(evidence, mean + self.gamma * variance)

    def layer_shares(self, evidence: Evidence) -> Tensor:
        before_window = evidence.num_keys - evidence.num_window

        def over_layer(values: Tensor) -> Tensor:
            return values[:, :before_window].double().view(evidence.layers, -1).sum(-1)

        entropy = over_layer(evidence.statistics[ops.ENTROPY])
        shift = over_layer(_variances(evidence))
        return entropy ** (1 / self.tau1) * shift ** (1 / self.tau2)


def _variances(evidence: Evidence) -> Tensor:
    """``[L * H, n]``: sum over the group of the unbiased variance over the window."""
    count = evidence.num_queries
    total = evidence.statistics[ops.SUM_SQUARES]
    between = evidence.statistics[ops.HEAD_SUM_SQUARES] / count
    return (total - between).clamp(min=0) / max(1, count - 1)
