# SPDX-License-Identifier: Apache-2.0
"""Scissorhands' layer shares: later layers get more.

https://arxiv.org/abs/2305.17118; ``policies/scissorhands.py`` says why, and that the line is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm.config.rules import number, option
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.shares.base import Shares


@dataclass(frozen=True)
class LaterLayers(Shares):
    """Growing linearly."""

    later: float = option(
        2.0, "share of the last layer over that of the first", *number(0, above=True)
    )

    def shares(self, evidence: Evidence, scores: Tensor | None = None) -> Tensor:
        return torch.linspace(
            1.0, self.later, evidence.layers, dtype=torch.float32, device=evidence.device
        )
