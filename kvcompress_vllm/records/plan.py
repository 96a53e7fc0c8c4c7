# SPDX-License-Identifier: Apache-2.0
"""The records that travel from the scheduler to every worker with a step. Picklable, plain ints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from kvcompress_vllm.records.budget import Ranges
from kvcompress_vllm.records.packing import Packing

Trigger = Literal["prefill", "decode", "pressure"]
"""A complete prompt, an outgrown budget, or a pool that runs short."""

TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)


class Observed(NamedTuple):
    """What is known to a policy that judges by all queries.

    An observation slot holds ``num_queries`` queries, ``stride`` tokens apart, the last of them at
    the end of the tokens in question. The accumulated statistics of the first ``known`` blocks
    count ``before`` earlier ones.
    """

    num_queries: int
    stride: int
    known: int
    before: int


@dataclass(frozen=True)
class Accumulation:
    """Add what the queries in an observation slot paid to the keys of a request to its
    accumulated statistics; nothing moves.

    ``old_blocks`` is the request's row as far as ``num_tokens`` tokens reach, which is where the
    observed queries end. Up to now its first ``old_covered`` blocks are packed into ``old_kept``,
    both 0 before the first compression. The keys in question are those of its first ``covered``
    blocks (F), all of them full.
    """

    request_id: str
    state_slot: int
    observe_slot: int
    num_tokens: int
    old_covered: int
    old_kept: int
    covered: int
    old_blocks: list[int]
    group: int = field(default=0, kw_only=True)
    """Index of the :class:`~kvcompress_vllm.records.group.CacheGroup` whose keys are meant."""
    policy: str | None = field(default=None, kw_only=True)
    """Whose statistics; None: of the configured one."""
    observed: Observed | None = field(default=None, kw_only=True)
    """What the observation slot holds; None: the last ``window`` queries."""
    unscored: Ranges = field(default=(), kw_only=True)
    """Positions ``[start, end)`` of candidates whose keys have no echo score."""
    old_state_slot: int | None = field(default=None, kw_only=True)
    """State slot that describes it as it is packed up to now: that of a context which it shares
    with others; None: its own."""

    replayed: bool = field(default=False, kw_only=True)
    """The echo scores of its keys are those of a real repetition."""

    @property
    def packed_slot(self) -> int:
        """State slot that describes its candidates."""
        return self.state_slot if self.old_state_slot is None else self.old_state_slot

    @property
    def old_packing(self) -> Packing:
        """As the request is packed up to now."""
        return Packing(self.old_covered, self.old_kept)

    @property
    def candidate_blocks(self) -> int:
        """Blocks whose K/V compete: those packed before, and those that filled up since."""
        return self.old_packing.candidates(self.covered)


@dataclass(frozen=True)
class Scoring(Accumulation):
    """Score the keys of a request, of which only the loss curve is wanted; nothing moves."""

    kept: int
    """C that is expected."""
    floor_pages: int | None = field(default=None, kw_only=True)
    """Pages that every head keeps; None: as configured."""
    protect: Ranges = field(default=(), kw_only=True)
    """Positions ``[start, end)`` that are kept whatever their score; the floor has room."""


@dataclass(frozen=True)
class Compression(Accumulation):
    """Compress one request at the start of the step.

    The kept K/V of its first ``covered`` blocks (F) go into ``new_blocks``, and the row becomes
    ``new_blocks``, null blocks up to F, tail. From then on ``state_slot`` describes it: that of a
    context, where others may take what is packed.
    """

    new_blocks: list[int]
    floor_pages: int | None = field(default=None, kw_only=True)
    """As of :class:`Scoring`."""
    protect: Ranges = field(default=(), kw_only=True)
    """As of :class:`Scoring`."""
    trigger: Trigger = field(default="prefill", kw_only=True)

    @property
    def kept(self) -> int:
        """C."""
        return len(self.new_blocks)

    @property
    def packing(self) -> Packing:
        """As the request is packed afterwards."""
        return Packing(self.covered, self.kept)

    @property
    def row_prefix(self) -> list[int]:
        """The first F blocks of the row afterwards: packed and null blocks."""
        return self.new_blocks + [0] * (self.covered - self.kept)


Judged = Scoring | Compression
"""Requests whose keys are scored."""


class Span(NamedTuple):
    """Tokens ``[first, end)`` of a request, which a step computes and scores."""

    request_id: str
    first: int
    end: int
    behind: int = 0
    """Tokens that it computes behind them, which are scored later."""


class Heard(NamedTuple):
    """Tokens ``[first, end)`` of an answer, or of the end of its prompt, whose queries are in an
    observation slot, all beside each other there, and whose keys get echo scores before the step.
    """

    request_id: str
    observe_slot: int
    first: int
    end: int
    blocks: list[int]
    """Its row, as far as token ``end`` reaches."""


class SavedQueries(NamedTuple):
    """Queries of tokens ``[first, first + num_tokens)`` of a request, all beside each other in an
    observation slot, and the blocks that hold a copy of them, as many for each B tokens."""

    request_id: str
    observe_slot: int
    first: int
    num_tokens: int
    """A multiple of B."""
    blocks: list[int]


class Replay(NamedTuple):
    """Tokens ``[first, end)`` of a request that repeats a context, and computes them in this step:
    what their queries pay to the context's keys becomes the echo scores of those."""

    request_id: str
    first: int
    end: int
    num_context: int
    """Blocks of the context: the first of ``blocks``."""
    blocks: list[int]
    """Its row, as far as token ``end`` reaches; nothing in it is packed."""
    begins: bool
    """The context has no such scores yet."""


class Observation(NamedTuple):
    """Copy queries of this step into an observation slot.

    Of the request's tokens in this step, which start at position ``first_token``, those at
    positions from ``observe_from`` on are observed: the last, and every ``stride``-th before it.
    """

    request_id: str
    observe_slot: int
    first_token: int
    observe_from: int
    stride: int = 1
    observe_until: int = 1 << 62
    """Queries from here on are not observed: the compression is due before them."""
    unverified: int = 0
    """The first token may come by so many positions earlier: where steps before this one still
    have drafted tokens to verify. Where, only the device knows."""

    def positions(self, num_tokens: int, window: int) -> range:
        """Observed positions among ``num_tokens`` tokens, last first; at most ``window``."""
        last = min(self.first_token + num_tokens, self.observe_until) - 1
        first = max(self.first_token, self.observe_from, last - window * self.stride + 1)
        return range(last, first - 1, -self.stride)

    def places(self, positions: range, window: int) -> list[int]:
        """Where the queries at these positions go: the ring indices of the ops."""
        slot, stride = self.observe_slot * window, self.stride
        return [slot + position // stride % window for position in positions]


class PackedRow(NamedTuple):
    """What the scheduler believes of a packed request, or of a context that requests share, users
    or not; sent only when integrity is checked."""

    request_id: str
    state_slot: int
    covered: int
    packed_blocks: list[int]
    group: int = 0
    """As of :class:`Accumulation`."""


@dataclass
class StepPlan:
    """All that one step asks of a worker, in the order in which it is carried out."""

    saved: list[SavedQueries] = field(default_factory=list)
    """To be copied out of slots, and into blocks, that this step may give to others."""
    released: list[int] = field(default_factory=list)
    """State slots whose request or context gave its packed blocks back."""
    accumulations: list[Accumulation] = field(default_factory=list)
    scorings: list[Scoring] = field(default_factory=list)
    compressions: list[Compression] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    """State slots that describe nothing from the forward of this step on; its compressions may
    still read them: of contexts, and of requests that now use one."""
    loaded: list[SavedQueries] = field(default_factory=list)
    """To be copied into slots that are free once the compressions are done."""
    observations: list[Observation] = field(default_factory=list)
    packed_prefills: list[str] = field(default_factory=list)
    """Packed requests that compute several tokens in this step."""
    heard: list[Heard] = field(default_factory=list)
    echoes: list[Span] = field(default_factory=list)
    """Tokens of this step whose keys get echo scores."""
    replays: list[Replay] = field(default_factory=list)
    expected: list[PackedRow] | None = None
    """Every packed request after the compressions, when integrity is checked."""

    def __bool__(self) -> bool:
        return bool(
            self.saved
            or self.released
            or self.accumulations
            or self.scorings
            or self.compressions
            or self.dropped
            or self.loaded
            or self.observations
            or self.packed_prefills
            or self.heard
            or self.echoes
            or self.replays
            or self.expected is not None
        )
