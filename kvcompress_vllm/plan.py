# SPDX-License-Identifier: Apache-2.0
"""The records that travel from the scheduler to every worker with a step. Picklable, plain ints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Trigger = Literal["prefill", "decode", "pressure"]
"""A complete prompt, an outgrown budget, or a pool that runs short."""

TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)


class Compression(NamedTuple):
    """Compress one request at the start of the step.

    ``old_blocks`` is the request's row as far as ``num_tokens`` tokens reach, which is where the
    observed queries end. Up to now its first ``old_covered`` blocks are packed into ``old_kept``,
    both 0 on the first compression. The kept K/V of its first ``covered`` blocks (F) go into
    ``new_blocks``, and the row becomes ``new_blocks``, null blocks up to F, tail.
    """

    request_id: str
    state_slot: int
    observe_slot: int
    num_tokens: int
    old_covered: int
    old_kept: int
    covered: int
    old_blocks: list[int]
    new_blocks: list[int]
    policy: str | None = None
    """What the request chose; None: the configured one."""
    trigger: Trigger = "prefill"
    floor_pages: int | None = None
    """Pages that every head keeps; None: as configured."""
    protect: tuple[tuple[int, int], ...] = ()
    """Positions ``[start, end)`` that are kept whatever their score; the floor has room."""

    @property
    def candidate_blocks(self) -> int:
        """Blocks whose K/V compete: those packed before, and those that filled up since."""
        return self.old_kept + self.covered - self.old_covered


class Observation(NamedTuple):
    """Copy queries of this step into an observation slot.

    Of the request's tokens in this step, which start at position ``first_token``, those at
    positions from ``observe_from`` on are observed.
    """

    request_id: str
    observe_slot: int
    first_token: int
    observe_from: int


class PackedRow(NamedTuple):
    """What the scheduler believes of a packed request; sent only when integrity is checked."""

    request_id: str
    state_slot: int
    covered: int
    packed_blocks: list[int]


@dataclass
class StepPlan:
    """All that one step asks of a worker, in the order in which it is carried out."""

    released: list[int] = field(default_factory=list)
    """State slots whose request gave its packed blocks back."""
    compressions: list[Compression] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    packed_prefills: list[str] = field(default_factory=list)
    """Packed requests that compute several tokens in this step."""
    expected: list[PackedRow] | None = None
    """Every packed request after the compressions, when integrity is checked."""

    def __bool__(self) -> bool:
        return bool(
            self.released
            or self.compressions
            or self.observations
            or self.packed_prefills
            or self.expected is not None
        )
