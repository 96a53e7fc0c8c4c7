# SPDX-License-Identifier: Apache-2.0
"""What one request asked for, and what it may keep. Known before any score exists.

A budget is resolved once, in the front end, from the configuration and what the request asked for
(:mod:`kvcompress_vllm.config.resolve`). It travels with the request as a plain dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Ranges = tuple[tuple[int, int], ...]


class Wish(NamedTuple):
    """What one request asked for; None: as configured. At most one of ratio, budget and mass."""

    ratio: float | None = None
    budget_tokens: int | None = None
    policy: str | None = None
    context_tokens: int | None = None
    protect: Ranges = ()
    mass: float | None = None
    exact: str | None = None
    context_stride: int | None = None


KEEP_ALL = Wish(ratio=1.0)


class RequestBudget(NamedTuple):
    """The resolved budget of one request. One of ``ratio`` and ``budget_tokens`` is set.

    Budgets are memory: with packed pages of fewer bits the same blocks hold more keys. What says
    how many keys stay whatever the budget (sinks, recent, least numbers of tokens) is keys, rounded
    up to whole packed pages.
    """

    policy: str
    ratio: float | None = None
    """Compressible blocks per kept block. Beside a mass, the ratio that is expected of it."""
    budget_tokens: int | None = None
    """Tokens per KV head on average, in memory of the cache's own dtype."""
    mass: float | None = None
    """Share of the score mass to keep; None: C follows from the ratio or the tokens."""
    least_ratio: float = 1.0
    """Lowest ratio, whatever was asked for."""
    most_ratio: float | None = None
    """Highest ratio, whatever was asked for; None: none."""
    fewest_tokens: int = 0
    """Tokens kept per KV head on average at least."""
    min_prompt_tokens: int = 1
    """Shorter requests are never compressed."""
    sinks: int = 0
    """First positions, which every head keeps."""
    recent: int = 0
    """Last positions, which every head keeps."""
    min_tokens_per_head: int = 0
    """Tokens that every head keeps at least."""
    protect: Ranges = ()
    """Positions ``[start, end)`` that are never evicted: ascending, apart from each other."""
    context_tokens: int | None = None
    """Compress once so many tokens are computed, before the rest of the prompt is read."""
    query_stride: int = 0
    """Every so-many-th query of the prompt counts; 0: those of the last window only."""
    history: int | None = None
    """With ``query_stride``: only queries of so many tokens before a compression; None: all."""
    blocks_per_page: int = 1
    """m, full blocks whose keys one packed block holds."""
    context_stride: int = 0
    """Compress at every multiple of so many tokens, and nowhere else; each is a context. 0: where
    the budget says."""
    exact: bool = False
    """Its context is scored by a real repetition, not by what echo scores foresee of one."""

    def to_plain(self) -> dict[str, Any]:
        """As :meth:`from_plain` takes it: numbers, strings and lists."""
        return {**self._asdict(), "protect": [list(pair) for pair in self.protect]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> RequestBudget:
        """What :meth:`to_plain` described; nothing is checked again."""
        protect = tuple((start, end) for start, end in plain["protect"])
        return cls(**{**plain, "protect": protect})

    def num_protected(self, num_keys: int) -> int:
        """Protected ones of the candidate keys ``[sinks, num_keys)``."""
        return sum(
            max(0, min(end, num_keys) - max(start, self.sinks)) for start, end in self.protect
        )

    def covered(self, num_tokens: int, block_size: int) -> int:
        """F of a compression at ``num_tokens`` tokens: full blocks, in whole packed pages."""
        return num_tokens // (block_size * self.blocks_per_page) * self.blocks_per_page

    def floor_pages(self, block_size: int, covered: int = 0) -> int:
        """Packed pages that every head keeps: for the shields and ``min_tokens_per_head``.

        Args:
            covered: full blocks that compete.
        """
        shields = self.sinks + self.recent + self.num_protected(covered * block_size)
        return max(
            1, -(-max(shields, self.min_tokens_per_head) // (block_size * self.blocks_per_page))
        )

    def fewest_blocks(self, block_size: int, covered: int = 0) -> int:
        """Blocks C at least: room for the floor of every head, and ``fewest_tokens``."""
        fewest = -(-self.fewest_tokens // (block_size * self.blocks_per_page))
        return max(self.floor_pages(block_size, covered), fewest)

    def packed_blocks(self, num_tokens: int, block_size: int, ratio: float | None = None) -> int:
        """Blocks C to keep of the F full blocks of ``num_tokens`` tokens; of a mass, as expected.

        Args:
            ratio: lowers the budget further, down to the fewest blocks.

        Returns:
            F itself where there is nothing to gain: a short prompt, ratio 1, or a budget that
            covers everything. Else no more than all keys take, which may be less than the budget.
        """
        covered = self.covered(num_tokens, block_size)
        allowed = self.allowed_blocks(num_tokens, block_size, ratio)
        return covered if allowed == covered else min(allowed, covered // self.blocks_per_page)

    def allowed_blocks(self, num_tokens: int, block_size: int, ratio: float | None = None) -> int:
        """Blocks that the budget allows for the F full blocks of ``num_tokens`` tokens, F at most.

        Args:
            ratio: as of :meth:`packed_blocks`.
        """
        covered = self.covered(num_tokens, block_size)
        if num_tokens < self.min_prompt_tokens:
            return covered
        if self.budget_tokens is not None:
            kept = -(-self.budget_tokens // block_size)
        else:
            kept = math.ceil(covered / (self.ratio or 1.0))
        return self._bounded(kept, covered, block_size, ratio)

    def most_blocks(self, num_tokens: int, block_size: int) -> int:
        """What ``allowed_blocks`` says, but of a mass what it may come to; C at most."""
        if self.mass is None:
            return self.allowed_blocks(num_tokens, block_size)
        covered = self.covered(num_tokens, block_size)
        return self._bounded(covered, covered, block_size)

    def _bounded(self, kept: int, covered: int, block_size: int, ratio: float | None = None) -> int:
        kept = min(kept, math.ceil(covered / self.least_ratio))
        if self.most_ratio is not None:
            kept = max(kept, math.ceil(covered / self.most_ratio))
        if ratio is not None:
            kept = min(kept, math.ceil(covered / ratio))
        return min(covered, max(kept, self.fewest_blocks(block_size, covered)))


def united(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ranges as :attr:`RequestBudget.protect` has them: ascending, apart from each other."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            start, last = result.pop()
            end = max(end, last)
        result.append((start, end))
    return tuple(result)


def num_recent(recent: int, num_tokens: int, covered: int, block_size: int) -> int:
    """Candidate keys at the end of every head that the recent window shields.

    The window is the last ``recent`` of ``num_tokens`` tokens; those after the ``covered`` full
    blocks are in the tail, which is kept anyway.
    """
    tail = num_tokens - covered * block_size
    return min(max(0, recent - tail), covered * block_size)
