# SPDX-License-Identifier: Apache-2.0
"""CAKE's layer shares: by how far attention disperses, and how much it shifts over the window.

https://arxiv.org/abs/2503.12491; formulas and differences in ``policies/cake.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.cake import variances
from kvcompress_vllm.policies.shares.base import Shares


@dataclass(frozen=True)
class CakeLayers(Shares):
    """Entropy and temporal variance, each to the power of an inverse temperature."""

    tau1: float = option(
        1.0, "temperature of the entropy in a layer's share", *number(0, above=True)
    )
    tau2: float = option(
        1.0, "temperature of the variance in a layer's share", *number(0, above=True)
    )

    channels = (ops.SUM_SQUARES, ops.HEAD_SUM_SQUARES, ops.ENTROPY)
    window = 32

    def shares(self, evidence: Evidence, scores: Tensor | None = None) -> Tensor:
        before_window = evidence.num_keys - evidence.num_window

        def over_layer(values: Tensor) -> Tensor:
            return values[:, :before_window].double().view(evidence.layers, -1).sum(-1)

        entropy = over_layer(evidence.statistics[ops.ENTROPY])
        shift = over_layer(variances(evidence))
        return entropy ** (1 / self.tau1) * shift ** (1 / self.tau2)
