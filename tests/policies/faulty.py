# SPDX-License-Identifier: Apache-2.0
"""Policies of another package with every fault. The trial has 256 keys; Late ones pass."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from kvcompress_vllm.policies import Defaults, Evidence, Policy

TRIAL = 256


def some(evidence: Evidence) -> torch.Tensor:
    """Scores as they should be: early keys first."""
    scores = -torch.arange(evidence.num_keys, dtype=torch.float32, device=evidence.device)
    return scores.expand(evidence.layers * evidence.heads, -1)


@dataclass(frozen=True)
class Fine(Policy):
    def score(self, evidence: Evidence) -> Any:
        return some(evidence)


@dataclass(frozen=True)
class ReturnsNothing(Policy):
    def score(self, evidence: Evidence) -> Any:
        return None


@dataclass(frozen=True)
class WrongShape(Policy):
    def score(self, evidence: Evidence) -> Any:
        return some(evidence)[:, 1:]


@dataclass(frozen=True)
class WrongType(Policy):
    def score(self, evidence: Evidence) -> Any:
        return some(evidence).double()


@dataclass(frozen=True)
class Raises(Policy):
    def score(self, evidence: Evidence) -> Any:
        raise KeyError("no such channel")


@dataclass(frozen=True)
class Exits(Policy):
    def score(self, evidence: Evidence) -> Any:
        sys.exit(5)


@dataclass(frozen=True)
class NotFinite(Policy):
    def score(self, evidence: Evidence) -> Any:
        return torch.where(some(evidence) == -40, float("nan"), some(evidence))


@dataclass(frozen=True)
class WorthNotFinite(Fine):
    def worth(self, evidence: Evidence) -> Any:
        return some(evidence) / 0


@dataclass(frozen=True)
class WrongWorth(Fine):
    def worth(self, evidence: Evidence) -> Any:
        return [1.0]


@dataclass(frozen=True)
class WrongLayers(Fine):
    defaults = Defaults(allocator="layer")

    def layer_shares(self, evidence: Evidence) -> Any:
        return torch.ones(evidence.layers + 1)


@dataclass(frozen=True)
class WrongHeads(Fine):
    defaults = Defaults(allocator="layer")

    def head_shares(self, evidence: Evidence, scores: torch.Tensor) -> Any:
        raise ZeroDivisionError("nothing left")


@dataclass(frozen=True)
class LateRaises(Policy):
    def score(self, evidence: Evidence) -> Any:
        if evidence.num_keys > TRIAL:
            raise KeyError("no such channel")
        return some(evidence)


@dataclass(frozen=True)
class LateNotFinite(Policy):
    def score(self, evidence: Evidence) -> Any:
        return some(evidence) / (evidence.num_keys <= TRIAL)


@dataclass(frozen=True)
class LateReturnsNothing(Policy):
    def score(self, evidence: Evidence) -> Any:
        return some(evidence) if evidence.num_keys <= TRIAL else None


@dataclass(frozen=True)
class LateWrongShape(Policy):
    def score(self, evidence: Evidence) -> Any:
        return some(evidence)[:, int(evidence.num_keys > TRIAL) :]


@dataclass(frozen=True)
class Huge(Policy):
    """Allowed: finite. Their sum is not, in fp32."""

    def score(self, evidence: Evidence) -> Any:
        return torch.full_like(some(evidence), 3e38)


@dataclass(frozen=True)
class LateRaisesOnRank1(Policy):
    def score(self, evidence: Evidence) -> Any:
        group = torch.distributed
        if evidence.num_keys > TRIAL and group.is_initialized() and group.get_rank() == 1:
            raise KeyError("no such channel")
        return some(evidence)


@dataclass(frozen=True)
class LateRaisesOnRank0(Policy):
    """The first pipeline stage, whose output vLLM never reads."""

    def score(self, evidence: Evidence) -> Any:
        group = torch.distributed
        if evidence.num_keys > TRIAL and group.is_initialized() and group.get_rank() == 0:
            raise KeyError("no such channel")
        return some(evidence)
