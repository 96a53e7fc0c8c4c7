# SPDX-License-Identifier: Apache-2.0
"""A policy of parts: the scores of one, with shares of others."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvcompress_vllm.policies.base import Evidence, Policy
from kvcompress_vllm.policies.shares.base import Shares

_OF_THE_SCORER = ("needs_keys", "observes_all", "history", "keeps_window", "additive", "defaults")


@dataclass(frozen=True)
class Combined(Policy):
    """Scores as ``scorer``; layers and heads share as told, and not as ``scorer`` would."""

    scorer: Policy = field(kw_only=True)
    layers: Shares | None = field(kw_only=True)
    heads: Shares | None = field(kw_only=True)

    def __post_init__(self) -> None:
        parts = (self.scorer, self.layers, self.heads)
        channels = {channel for part in parts if part is not None for channel in part.channels}
        object.__setattr__(self, "channels", tuple(sorted(channels)))
        for name in _OF_THE_SCORER:
            object.__setattr__(self, name, getattr(self.scorer, name))

    def score(self, evidence: Evidence) -> Tensor:
        return self.scorer.score(evidence)

    def worth(self, evidence: Evidence) -> Tensor | None:
        return self.scorer.worth(evidence)

    def layer_shares(self, evidence: Evidence) -> Tensor | None:
        return None if self.layers is None else self.layers.shares(evidence)

    def head_shares(self, evidence: Evidence, scores: Tensor) -> Tensor | None:
        return None if self.heads is None else self.heads.shares(evidence, scores)
