# SPDX-License-Identifier: Apache-2.0
"""What the planner knows of one compressible request."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvcompress_vllm.records.budget import Ranges, RequestBudget, united
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.plan import Trigger
from kvcompress_vllm.scheduling.contexts import Context
from kvcompress_vllm.scheduling.echo import Unscored
from kvcompress_vllm.scheduling.segments import SEGMENT
from kvcompress_vllm.scheduling.sizes import NEVER, NOTHING, Sizes


@dataclass
class Tracked:
    """One compressible request, from admission on."""

    request_id: str
    state_slot: int
    sizes: Sizes
    """Of its budget. Once a mass budget was scored, it expects of the next what this one was."""
    due_at: int
    """Compressed once so many of its tokens are computed."""
    prefill_end: int = 0
    """Tokens that its prefill computes."""
    number: int = 0
    """Who was admitted later has a higher one."""
    observe_slot: int | None = None
    """Held from shortly before a compression until it is carried out."""
    packing: Packing = NOTHING
    """As it is packed now; C is 0 until the first compression."""
    accumulated: int = 0
    """Tokens whose queries its statistics count; of a policy that judges by all queries."""
    known: int = 0
    """Blocks whose keys have accumulated statistics."""
    counted: int = 0
    """Queries counted in them."""
    ratio: float | None = None
    """Of the compression that is under way, where the pool ran short; None: its usual budget."""
    trigger: Trigger = "decode"
    """Of the compression that comes next."""
    usual_due: int = NEVER
    """``due_at`` as it was before the pool ran short."""
    curve: LossCurve | None = None
    """Of its latest compression, once the worker has reported it."""
    scored_at: int = 0
    """``due_at`` for which its loss curve was asked for; a mass budget."""
    decided: int | None = None
    """C of the compression that comes next, once that curve was seen."""
    reads_echo: bool = False
    """Whether its policy judges by echo scores."""
    unscored: Unscored = field(default_factory=Unscored)
    """Where echo scores are stored: its keys without one."""
    unheard: Ranges = ()
    """Packed ones of those: nothing is known of them, so they are kept."""
    listen_slot: int | None = None
    """Observation slot that it holds to have scored what it decodes; the same as ``observe_slot``
    once it has that."""
    listened: int = 0
    """Tokens up to which that was done."""

    heard_until: int = 0
    """End of the segment that another request began and whose queries it took over; up to there its
    prefill is heard like what is decoded, as no step has all queries of that segment. 0: none."""
    heard_slot: int | None = None
    """Observation slot with the queries of that segment, until it is scored, where the same step
    went on to the segment that ``listen_slot`` is for."""
    echoed: int | None = None
    """Tokens up to which its keys have the echo scores of whole segments, which follow from tokens
    alone; None: it has not computed anything yet."""
    replayed: bool = False
    """Whether its context was repeated, so that it can be packed (``scheduling/replay.py``)."""
    wanted: dict[int, bytes] = field(default_factory=dict)
    """Contexts that it computes for others as well, until they are packed: key by tokens."""
    prefix: bytes | None = None
    """With a stride: key of the context as which it is packed, by itself or another. What it
    computes behind that follows from its tokens and from this. None: it is not packed yet."""
    cached: int = 0
    """Tokens up to which others find that."""
    context: Context | None = None
    """Whose blocks its row starts with; None: its packed blocks are its own."""

    @property
    def budget(self) -> RequestBudget:
        return self.sizes.budget

    @property
    def covered(self) -> int:
        return self.packing.covered

    @property
    def kept(self) -> int:
        return self.packing.kept

    @property
    def in_prefill(self) -> bool:
        """Whether the compression that comes next interrupts the prefill, or ends it."""
        return self.due_at <= self.prefill_end

    @property
    def starts_observed(self) -> bool:
        """Whether its prefill computes queries that the compression observes which comes next: one
        of a prompt, or one that a stride puts shortly behind it."""
        behind = self.due_at - self.sizes.limits.window
        return self.in_prefill or (self.sizes.stride > 0 and behind < self.prefill_end)

    @property
    def is_told_by_tokens(self) -> bool:
        """Whether the scores that its next compression goes by follow from its tokens alone."""
        return not self.reads_echo or (self.echoed or 0) >= self.due_at

    def found_unscored(self, begin: int, end: int) -> None:
        """Note that tokens ``[begin, end)``, which it found in the cache, have no score."""
        self.echoed = begin
        self.unscored.computed(begin, end, scored=False)

    def echoes(self, first: int, end: int) -> None:
        """Note that tokens ``[first, end)`` are scored together, cut at segments."""
        begin = first + -first % SEGMENT
        if self.echoed is not None and begin <= self.echoed:
            self.echoed = max(self.echoed, end - end % SEGMENT)

    @property
    def awaits_curve(self) -> bool:
        """Whether C can only be told from a loss curve. What a peak forces, or goes beyond the
        budget because the pool runs short, does not wait for one."""
        return (
            self.observe_slot is not None
            and self.decided is None
            and self.budget.mass is not None
            and self.ratio is None
            and (self.due_at >= self.prefill_end or self.due_at == self.sizes.context)
        )

    @property
    def awaits_replay(self) -> bool:
        """Whether its context is to be repeated before it is packed."""
        return (
            self.budget.exact
            and not self.replayed
            and self.observe_slot is not None
            and self.due_at == self.sizes.context
        )

    def target(self) -> Packing:
        """Of the compression that it awaits; with a mass budget as expected of it, until known."""
        if self.decided is not None:
            return Packing(self.sizes.covered(self.due_at), self.decided)
        covered, kept = self.packed(self.due_at, self.ratio)
        # It may be more than a peak, or pressure, has left of the request.
        return Packing(covered, min(kept, self._all_kept(covered)))

    @property
    def packed_slot(self) -> int:
        """State slot that describes it as it is packed now."""
        return self.state_slot if self.context is None else self.context.slot

    @property
    def used_by_others(self) -> int:
        """Its packed blocks that stay in use when it lets go of them."""
        return self.kept if self.context is not None and len(self.context.users) > 1 else 0

    def gives_back(self, new: Packing) -> int:
        """Blocks that come free when it is packed anew."""
        return self.packing.gives_back(new) - self.used_by_others

    def gain(self, num_tokens: int, ratio: float | None = None) -> int:
        """Blocks that a compression at ``num_tokens`` tokens would give back.

        Args:
            ratio: compress at least so much.
        """
        return self.gives_back(self.packed(num_tokens, ratio))

    def packed(self, num_tokens: int, ratio: float | None = None) -> Packing:
        """Of a compression at ``num_tokens`` tokens.

        Args:
            ratio: compress at least so much.
        """
        whole = self.whole(self.sizes.covered(num_tokens))
        if whole:
            return self.sizes.packed(num_tokens, ratio, whole)
        return self.sizes.packed_at(num_tokens, self.prefill_end, ratio)

    def unknown(self, covered: int) -> Ranges:
        """What a compression that covers ``covered`` blocks must keep for want of scores, beside
        what was kept for that before: decoded without a slot. Less than a block is not worth it.

        With a mass they have no score, and count as nothing.
        """
        if not self.reads_echo or self.budget.mass is not None:
            return ()
        block_size = self.sizes.limits.block_size
        end = covered * block_size
        if self.listen_slot is not None:
            end = min(end, self.listened)  # what comes behind will be heard by then
        found = self.unscored.before(end)
        return found if sum(end - start for start, end in found) >= block_size else ()

    def protect(self, covered: int) -> Ranges:
        """Positions that a compression of ``covered`` blocks keeps whatever their score. Ranges
        only ever come behind those that are packed (``compression/protection.py`` counts on it)."""
        unheard = (*self.unheard, *self.unknown(covered))
        return united((*self.budget.protect, *unheard)) if unheard else self.budget.protect

    def whole(self, covered: int) -> int:
        """Blocks' worth of tokens that are kept for want of scores."""
        protect = self.protect(covered)
        if protect is self.budget.protect:
            return 0
        block_size = self.sizes.limits.block_size
        num_keys = covered * block_size
        more = self.budget._replace(protect=protect).num_protected(num_keys)
        return -(-(more - self.budget.num_protected(num_keys)) // block_size)

    def outgrown_at(self, due_at: int) -> int:
        """When it has outgrown its budget, by what is known of it until ``due_at`` tokens; before
        that where it does not keep more than was thought."""
        block_size = self.sizes.limits.block_size
        whole = self.whole(self.sizes.covered(due_at))
        if not whole:
            return due_at
        shared = self.kept if self.covered * block_size == self.sizes.context else 0
        return self.sizes.outgrown_at(self.packing, whole, shared)

    def floor(self, covered: int) -> int:
        """Packed pages that every head keeps of ``covered`` blocks."""
        k = self.sizes.limits.kernel_blocks
        pages = -(-self.whole(covered) * k // self.sizes.blocks_per_page)
        return min(self.sizes.floor_pages(covered) + pages, self._all_kept(covered) * k)

    def _all_kept(self, covered: int) -> int:
        return self.packing.all_kept(covered, self.sizes.blocks_per_page)
