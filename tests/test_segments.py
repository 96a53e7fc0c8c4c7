# SPDX-License-Identifier: Apache-2.0
"""Where chunks end for echo scores, and which blocks hold whole segments."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from kvcompress_vllm.scheduling.segments import (
    SEGMENT,
    WholeBlocks,
    segments,
    unscored,
    whole_segments,
)

M = SEGMENT


def test_segments_are_cut_at_multiples():
    assert list(segments(0, 2 * M)) == [(0, M), (M, 2 * M)]
    assert list(segments(100, M + 9)) == [(100, M), (M, M + 9)]
    assert list(segments(5, 5)) == []


def test_a_single_token_is_no_segment_and_counts_as_unscored():
    assert list(segments(0, M + 1)) == [(0, M)] and list(unscored(0, M + 1)) == [(M, M + 1)]
    assert list(unscored(M - 1, M + 2)) == [(M - 1, M)]
    assert list(unscored(7, 8)) == [(7, 8)] and list(unscored(0, M)) == []


def prefill(length: int, marks: tuple[int, ...], budgets) -> tuple[list[tuple[int, int]], int]:
    """The segments of a prefill whose steps have so many tokens left, and how often it waited."""
    first, waited, found = 0, 0, []
    while first < length:
        budget, room = next(budgets)
        stop = min((mark for mark in marks if mark > first), default=length)
        count = whole_segments(first, min(budget, stop - first), (*marks, length), room)
        waited += count == 0
        assert waited < 1000
        found += segments(first, first + count)
        first += count
    return found, waited


@pytest.mark.parametrize("seed", range(50))
def test_any_chunks_give_the_same_segments(seed):
    source = random.Random(seed)
    length = source.randrange(1, 5 * M)
    marks = tuple(sorted(source.sample(range(1, length + 1), min(length, source.randrange(3)))))
    whole, _ = prefill(length, marks, iter(lambda: (length, length), None))

    def budgets():
        while True:  # now and then a step has the room that was promised
            yield source.randrange(1, 2 * M), 2 * M
            yield 2 * M, 2 * M

    assert prefill(length, marks, budgets())[0] == whole
    bounds = [0, *marks, length]
    scored = {p for begin, end in whole for p in range(begin, end)}
    blank = {
        p
        for begin, end in pairwise(bounds)
        for first, stop in unscored(begin, end)
        for p in range(first, stop)
    }
    assert scored | blank == set(range(length)) and not scored & blank


@pytest.mark.parametrize("budget", [1, 16, M - 1])
def test_without_room_for_a_segment_nobody_waits(budget):
    found, waited = prefill(3 * M + 5, (), iter(lambda: (budget, budget), None))
    assert waited == 0 and (budget == 1 or found)


def test_whoever_waits_is_sure_of_the_room():
    assert [whole_segments(200, 10, (400,), room) for room in (55, 56)] == [10, 0]
    assert [whole_segments(200, 10, (230,), room) for room in (29, 30)] == [10, 0]
    assert [whole_segments(10, 1, (300,), room) for room in (M - 11, M)] == [1, 0]


def test_decoding_is_left_alone():
    assert whole_segments(3 * M + 7, 1, (3 * M + 7,), M) == 1
    assert whole_segments(10, 0, (300,), M) == 0


def equal(one: int, other: int) -> bool:
    return one == other


def test_only_whole_segments_can_be_hit():
    blocks = WholeBlocks(100, 16)
    row = list(range(99, 39, -1))
    blocks.computed(row, 0, 2 * M + 40, True)

    def usable(length: int) -> int:
        found = blocks.usable(row[: length // 16], equal)
        assert found == row[: len(found)]
        return len(found) * 16

    assert usable(2 * M + 32) == 2 * M
    assert usable(M + 16) == M and usable(M - 16) == 0
    # Its answer fills the third segment token by token.
    for position in range(2 * M + 40, 3 * M):
        blocks.computed(row[position // 16 :], position, position + 1, True)
    assert usable(3 * M) == 2 * M
    # Another request computes one of its blocks without scores.
    blocks.computed(row[20:], 320, 336, False)
    assert usable(3 * M) == M


def test_whoever_hits_a_segment_computes_the_next_whole():
    blocks = WholeBlocks(100, 16)
    row = list(range(60))
    blocks.computed(row, 0, M, True)
    blocks.computed(row[M // 16 :], M, 2 * M, True)
    assert blocks.usable(row[: 2 * M // 16], equal) == row[: 2 * M // 16]


def test_a_segment_in_two_parts_is_not_whole():
    blocks = WholeBlocks(100, 16)
    row = list(range(60))
    blocks.computed(row, 0, 112, True)
    blocks.computed(row[7:], 112, 2 * M, True)
    assert blocks.usable(row[: 2 * M // 16], equal) == []


def test_blocks_of_two_segments_are_not_mixed():
    """Two prompts share their first 200 tokens; the cache hands out the first one's blocks."""
    blocks = WholeBlocks(100, 16)
    one, two = list(range(1, 17)), list(range(21, 37))
    blocks.computed(one, 0, M, True)
    blocks.computed(two, 0, M, True)
    mixed = one[:12] + two[12:]
    assert blocks.usable(mixed, lambda a, b: a % 20 == b % 20) == two
    assert blocks.usable(mixed, equal) == []  # the second one's are gone
    assert blocks.usable(one, equal) == one


def test_blocks_must_divide_segments():
    with pytest.raises(ValueError, match="block-size 48"):
        WholeBlocks(10, 48)
