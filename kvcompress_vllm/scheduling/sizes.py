# SPDX-License-Identifier: Apache-2.0
"""How many blocks a request keeps at any length, and when it has outgrown that."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.scheduling.limits import Limits

NEVER = 1 << 62
"""Token count at which nothing ever is due."""

MOST_REMEMBERED = 100_000
"""Sizes that are kept at hand for one budget."""

NOTHING = Packing()


class Sizes:
    """(F, C) of one budget in one engine. Asked for every request on every step."""

    def __init__(
        self, budget: RequestBudget, limits: Limits, marks: tuple[int, ...] | None = None
    ) -> None:
        """
        Args:
            marks: what the property of that name would find.
        """
        self.budget = budget
        self.limits = limits
        if marks is not None:
            self.marks = marks
        self._allowed: dict[tuple[int, float | None], int] = {}

    @property
    def blocks_per_page(self) -> int:
        """m, full blocks whose keys one packed block holds."""
        return self.budget.blocks_per_page

    def covered(self, num_tokens: int) -> int:
        """F of a compression at ``num_tokens`` tokens."""
        return self.budget.covered(num_tokens, self.limits.block_size)

    @cached_property
    def context(self) -> int | None:
        """``context_tokens`` in whole blocks (of packed pages), so that others can take what is
        packed there; None: not asked for, or less than that."""
        size = self.limits.block_size * self.blocks_per_page
        return (self.budget.context_tokens or 0) // size * size or None

    @cached_property
    def stride(self) -> int:
        """``context_stride`` in whole blocks (of packed pages); 0: there is none."""
        size = self.limits.block_size * self.blocks_per_page
        return self.budget.context_stride // size * size

    @cached_property
    def marks(self) -> tuple[int, ...]:
        """Tokens at which a request with a stride is compressed, and nowhere else, ascending: each
        multiple at which that gives blocks back, if it was compressed at those before."""
        if not self.stride:
            return ()
        found, packing = [], NOTHING
        for mark in range(self.stride, self.limits.max_tokens + 1, self.stride):
            packed = self.packed(mark)
            if packing.gives_back(packed) > 0:
                found.append(mark)
                packing = packed
        return tuple(found)

    def at_marks(self, num_tokens: int) -> tuple[Packing, int]:
        """How a request with a stride is packed at ``num_tokens`` tokens, and its next mark; may be
        NEVER."""
        place = bisect_right(self.marks, num_tokens)
        packing = self.packed(self.marks[place - 1]) if place else NOTHING
        return packing, self.marks[place] if place < len(self.marks) else NEVER

    @cached_property
    def reaches_context(self) -> bool:
        """Whether a prompt that goes on behind its context is compressed there. What happens up to
        there depends on no token behind it."""
        if self.context is None:
            return False
        packing, now, end = NOTHING, 0, self.context + 1
        while now < self.context:
            now = self.interrupted_at(packing, now, end)
            packing = self.packed_at(min(now, end), end)
        return now == self.context

    def packed(self, num_tokens: int, ratio: float | None = None, whole: int = 0) -> Packing:
        """Of a compression at ``num_tokens`` tokens; of a mass, as expected.

        Args:
            ratio: compress at least so much.
            whole: blocks' worth of tokens whose keys all stay, whatever the budget says of others.
        """
        covered, allowed = self._budgeted(num_tokens, ratio, whole)
        if allowed == covered:
            return Packing(covered, covered)
        return Packing(covered, min(allowed, covered // self.blocks_per_page))

    def excess(self, packing: Packing, num_tokens: int, whole: int = 0) -> int:
        """Blocks that a request holds beyond its budget at ``num_tokens`` tokens; may be negative.

        Args:
            packing: as it is packed.
            whole: as of :meth:`packed`.
        """
        return packing.gives_back(self._budgeted(num_tokens, whole=whole))

    def _budgeted(self, num_tokens: int, ratio: float | None = None, whole: int = 0) -> Packing:
        """F, and the blocks that the budget allows for it: more than all keys take, perhaps."""
        covered = self.covered(num_tokens)
        if whole:
            others = self._budgeted(num_tokens - whole * self.limits.block_size, ratio).kept
            pages = -(-whole // self.blocks_per_page)
            return Packing(covered, min(covered, max(others, self.floor(covered)) + pages))
        if num_tokens < self.budget.min_prompt_tokens:
            return Packing(covered, covered)
        key = covered, ratio
        if key not in self._allowed:
            if len(self._allowed) >= MOST_REMEMBERED:
                self._allowed.clear()
            self._allowed[key] = self.budget.allowed_blocks(
                num_tokens, self.limits.block_size, ratio
            )
        return Packing(covered, self._allowed[key])

    def floor(self, covered: int = 0) -> int:
        """Blocks that hold what every head keeps of ``covered`` blocks, if it has as many."""
        return self.budget.floor_pages(self.limits.block_size, covered)

    def floor_pages(self, covered: int = 0) -> int:
        """The same in packed pages of a head: more of them, of a part of a block each, where blocks
        have several kernel blocks."""
        k = self.limits.kernel_blocks
        return self.budget.floor_pages(self.limits.block_size // k, covered * k)

    def packed_at(self, due_at: int, prefill_end: int, ratio: float | None = None) -> Packing:
        """As ``packed``; of a compression that interrupts the prefill, within half of the peak."""
        packing = self.packed(due_at, ratio)
        if self.limits.peak_blocks is None or due_at >= prefill_end:
            return packing
        covered, kept = packing
        if self.context != due_at:
            # What the whole prompt may keep need not go yet; of a mass that may be all.
            whole = self.packed(self._end(due_at, prefill_end), ratio).kept
            kept = covered if self.budget.mass is not None else max(kept, whole)
        return Packing(covered, self.within_peak(covered, kept))

    def within_peak(self, covered: int, kept: int) -> int:
        """C of a compression that interrupts the prefill: at most half of the peak, and room for
        the floor."""
        if self.limits.peak_blocks is not None:
            kept = max(min(kept, self.limits.peak_blocks // 2), self.floor(covered))
        return min(covered // self.blocks_per_page, kept)

    def _end(self, now: int, prefill_end: int) -> int:
        """Up to where a prefill matters to what is done after ``now`` tokens: a context is packed
        alike, whatever comes behind it."""
        if self.context is not None and now < self.context:
            return min(self.context, prefill_end)
        return prefill_end

    def outgrown_at(self, packing: Packing = NOTHING, whole: int = 0, shared: int = 0) -> int:
        """Tokens at which a request has ``interval`` blocks more than its budget; may be NEVER.

        Args:
            packing: as it is packed so far.
            whole: as of :meth:`packed`.
            shared: of its packed blocks, those that others may use: packing it anew does not free
                them.
        """
        interval, size, m = self.limits.interval, self.limits.block_size, self.blocks_per_page
        if not self.limits.decode:
            return NEVER
        # From the shortest compressible request on, the excess grows by at most one block per
        # block, so these strides cannot miss the place. It changes with whole packed pages only.
        pages = max(packing.covered // m, -(-self.budget.min_prompt_tokens // (m * size)))
        while pages * m * size <= self.limits.max_tokens:
            excess = self.excess(packing, pages * m * size, whole)
            if excess >= interval + shared:
                return pages * m * size
            pages += -(-(interval + shared - excess) // m)
        return NEVER

    @cached_property
    def first_outgrown(self) -> int:
        """``outgrown_at`` of a request that is not packed."""
        return self.outgrown_at()

    def after_interval(self, num_tokens: int) -> int:
        """Tokens at which a request has ``interval`` blocks more; NEVER where ``decode`` is off."""
        if not self.limits.decode:
            return NEVER
        return num_tokens + self.limits.interval * self.limits.block_size

    def interrupted_at(self, packing: Packing, now: int, prefill_end: int) -> int:
        """Tokens at which a compression interrupts a prefill after ``now`` tokens; may be NEVER.

        Args:
            packing: as the request is packed so far.
        """
        size, peak = self.limits.block_size, self.limits.peak_blocks
        marks = []
        if self.context is not None:
            marks.append(self.context)
        if peak is not None and self.packed(self._end(now, prefill_end)).gains:
            m = self.blocks_per_page
            room = (peak - packing.kept) // m * m  # for whole packed pages
            marks.append((packing.covered + room) * size)
        return min(
            (
                mark
                for mark in marks
                if now < mark < prefill_end
                and packing.gives_back(self.packed_at(mark, prefill_end)) > 0
            ),
            default=NEVER,
        )

    def first_due(self, num_tokens: int) -> int:
        """Tokens at which a request whose prefill computes ``num_tokens`` is compressed first."""
        if self.stride:
            return self.context or NEVER
        interrupted_at = self.interrupted_at(NOTHING, 0, num_tokens)
        if interrupted_at < num_tokens:
            return interrupted_at
        return num_tokens if self.packed(num_tokens).gains else self.first_outgrown

    def next_due(self, packing: Packing, now: int, prefill_end: int, whole: int = 0) -> int:
        """When a request that was compressed at ``now`` tokens is compressed again.

        One that is packed as its context may share those blocks with others. It is then not packed
        anew before that is worth a copy of them, whether others are there or not: what it answers
        must not depend on them. So beside the context nobody holds more than without compression.

        Args:
            whole: as of :meth:`packed`.
        """
        if self.stride:
            return self.context if self.context is not None and self.context > now else NEVER
        shared = packing.kept if now == self.context else 0
        if now < prefill_end:
            interrupted_at = self.interrupted_at(packing, now, prefill_end)
            if interrupted_at < prefill_end:
                return interrupted_at
            if self.excess(packing, prefill_end) >= self.limits.interval + shared:
                return prefill_end
        return self.outgrown_at(packing, whole, shared)


def check_peak(config: KVCompressConfig, sizes: Sizes) -> None:
    """Refuse a peak that leaves no room for what every head keeps.

    Raises:
        ValueError: with the numbers.
    """
    peak, floor, size = sizes.limits.peak_blocks, sizes.floor(), sizes.limits.block_size
    if peak is None:
        return
    if peak // 2 < floor:
        raise ValueError(
            f"kv_compress: prefill_peak_tokens={config.prefill_peak_tokens} is too small: half of "
            f"it must hold the {floor * size} tokens that every head keeps "
            "(sinks, recent, min_tokens_per_head)"
        )
    if peak - peak // 2 < sizes.blocks_per_page:
        raise ValueError(
            f"kv_compress: prefill_peak_tokens={config.prefill_peak_tokens} is too small: half of "
            f"it must hold the {sizes.blocks_per_page * size} tokens of a packed page "
            f"(page_dtype={config.page_format.label})"
        )
