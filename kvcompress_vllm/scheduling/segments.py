# SPDX-License-Identifier: Apache-2.0
"""Segments of prompts for echo scores: where chunks end, and which blocks have whole segments.

Keys are scored segment by segment, ``SEGMENT`` tokens from each multiple of it on. The scores of a
segment depend on the tokens up to its end and on nothing else, so they are the same however a
prompt is cut into chunks, and whoever finds its blocks in the prefix cache can use them, too. That
is so if a step computes whole segments; what it cuts (a prompt's end, a compression in its middle,
a step without room) is scored in parts, for the request itself alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

SEGMENT = 256
"""Tokens of a segment; blocks must divide it."""

DECODED = 16
"""Tokens of a segment of what is decoded: the queries of so many wait in an observation slot. With
64 answers are hardly better (docs/quality.md), and a slot takes four times the memory."""


def segments(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Positions ``[first, end)`` cut at the multiples of :data:`SEGMENT`.

    None of a single token: a prompt's last one may come alone, in a step that scores nothing, and
    what is scored must not depend on the chunks.
    """
    while first < end:
        stop = min(end, first - first % SEGMENT + SEGMENT)
        if stop - first > 1:
            yield first, stop
        first = stop


def unscored(first: int, end: int) -> Iterator[tuple[int, int]]:
    """Positions of ``[first, end)`` that are in none of its segments."""
    for begin, stop in segments(first, end):
        if first < begin:
            yield first, begin
        first = stop
    if first < end:
        yield first, end


def whole_segments(first: int, num_tokens: int, marks: Sequence[int], room: int) -> int:
    """How many of ``num_tokens`` tokens a prefill computes next, so that its segments are whole.

    Args:
        first: position of the first of them.
        marks: where the prefill ends, or is interrupted: positions that may cut a segment.
        room: tokens that a later step may have for this request, if it computes none now.

    Returns:
        0: the request waits for a step with more room. That is only said where ``room`` suffices.
    """
    end = first + num_tokens
    if end in marks or num_tokens < 1 or end > max(marks):
        return num_tokens
    aligned = end - end % SEGMENT
    if aligned > first:
        return aligned - first
    needed = min(mark for mark in (*marks, aligned + SEGMENT) if mark > first) - first
    return 0 if needed <= room else num_tokens


def check_block_size(block_size: int) -> None:
    """Refuse blocks of which a segment is no multiple.

    Raises:
        ValueError: with the sizes that are accepted.
    """
    if SEGMENT % block_size:
        raise ValueError(
            f"kv_compress: --block-size {block_size} is not accepted with policy=echo, which "
            f"scores segments of {SEGMENT} tokens; it must divide {SEGMENT} (16, 32, 64, 128), or "
            "neither policy nor allow_policies may name echo"
        )


class WholeBlocks:
    """Which blocks of the pool hold the scores of whole segments, and whose.

    The prefix cache knows a block by the tokens up to its own end; its scores depend on those up to
    the end of its segment. So a hit may be made of blocks of several segments that differ behind
    them; only blocks that were scored together are used, which may be others with the same tokens.

    A block is computed anew before the prefix cache knows it under another hash, so nothing has to
    be told when one is freed.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        check_block_size(block_size)
        self._segment: list[tuple[int, ...] | None] = [None] * num_blocks
        """By block, all blocks of the whole segment that it was scored in."""
        self._block_size = block_size

    def computed(self, row: Sequence[int], first: int, end: int, scored: bool) -> None:
        """Note that a step computes tokens ``[first, end)`` of a request.

        Args:
            row: its block ids from block ``first // block_size`` on.
            scored: whether it scores them.
        """
        size, begin = self._block_size, first // self._block_size
        for index in range(begin, -(-end // size)):
            self._segment[row[index - begin]] = None
        start = -(-first // SEGMENT) * SEGMENT
        while scored and start + SEGMENT <= end:
            at = start // size - begin
            blocks = tuple(row[at : at + SEGMENT // size])
            for block in blocks:
                self._segment[block] = blocks
            start += SEGMENT

    def taken_over(self, row: Sequence[int]) -> None:
        """Note that some blocks will be scored anew, with what a request computes behind them: so
        far they may have been part of another's segment."""
        for block in row:
            self._segment[block] = None

    def usable(self, row: Sequence[int], same: Callable[[int, int], bool]) -> list[int]:
        """The leading whole segments of a prefix cache hit.

        Args:
            row: block ids of the hit.
            same: whether the cache knows two blocks under one hash.

        Returns:
            Block ids with the same tokens, a multiple of a segment.
        """
        found: list[int] = []
        count = SEGMENT // self._block_size
        while len(found) + count <= len(row):
            hit = row[len(found) : len(found) + count]
            blocks = self._segment[hit[-1]]
            if blocks is None or blocks[-1] != hit[-1]:
                break
            if not all(self._segment[block] is blocks for block in blocks):
                break
            if not all(map(same, blocks, hit)):
                break
            found += blocks
        return found
