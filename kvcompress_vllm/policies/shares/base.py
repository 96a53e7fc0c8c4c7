# SPDX-License-Identifier: Apache-2.0
"""What shares are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from kvcompress_vllm.policies.base import Evidence


@dataclass(frozen=True)
class Shares(ABC):
    """Divides a budget. Options are fields of :func:`kvcompress_vllm.config.rules.option`."""

    of_heads: ClassVar[bool] = False
    """Whether it divides between the heads of a layer; else between layers."""
    channels: ClassVar[tuple[int, ...]] = ()
    """What it reads of every key, beside what the policy does. Those of the attention must be of
    the last queries, so they do not go with a policy that judges by all."""
    window: ClassVar[int | None] = None
    """Observed queries that it prefers; None: as the policy. More than one where it reads channels
    over time."""

    @abstractmethod
    def shares(self, evidence: Evidence, scores: Tensor | None = None) -> Tensor | None:
        """``[L]``, or ``[L, H]`` where it is of heads: weights >= 0 of what the shields leave; None
        is as if there were none.

        Args:
            scores: ``[L * H, n]`` of the policy; only for heads.
        """

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The fields that ``policy_options`` may set, by name."""
        return {option.name: option for option in fields(cls) if "accepts" in option.metadata}
