# SPDX-License-Identifier: Apache-2.0
"""What would have been preempted, step by step."""

from __future__ import annotations

from kvcompress_vllm.records.plan import Compression, Trigger
from kvcompress_vllm.reporting.shortage import Shortage

NEVER = 1 << 62


def compression(name: str, given_back: int, trigger: Trigger = "pressure") -> Compression:
    blocks = list(range(20))
    return Compression(name, 0, 0, 320, 0, 0, 20, blocks, blocks[given_back:], trigger=trigger)


def step(shortage: Shortage, free: int, computed: int = 100) -> int:
    """ "c" is the latest request. They hold 3, 2 and 1 blocks."""
    return shortage.step(free, lambda name: computed, [("c", 1), ("b", 2), ("a", 3)])


def test_as_many_requests_as_hold_what_would_be_missing() -> None:
    shortage = Shortage()
    assert step(shortage, 0) == 0
    shortage.compressed(compression("a", 10), NEVER)
    assert step(shortage, 10) == 0
    assert step(shortage, 9) == 1  # "c"
    assert step(shortage, 9) == 0, "the same shortage"
    assert step(shortage, 7) == 1  # and "b"
    assert step(shortage, 8) == 0
    assert step(shortage, 10) == 0
    assert step(shortage, 7) == 2, "a new shortage"
    assert step(shortage, 0) == 1  # "a", which holds 10 more


def test_a_victim_gives_back_what_pressure_took_from_it() -> None:
    shortage = Shortage()
    shortage.compressed(compression("c", 10), NEVER)
    assert step(shortage, 0) == 1


def test_blocks_count_until_they_would_have_come_back_anyway() -> None:
    shortage = Shortage()
    shortage.compressed(compression("a", 10), 150)
    assert step(shortage, 5, computed=150) == 0
    shortage.compressed(compression("a", 10), 250)
    shortage.compressed(compression("a", 0, trigger="decode"), NEVER)
    assert step(shortage, 5, computed=151) == 0
    shortage.compressed(compression("a", 10), 250)
    shortage.compressed(compression("a", 3), 350)
    assert step(shortage, 12, computed=249) == 1
    assert step(shortage, 3, computed=250) == 0
    assert step(shortage, 2, computed=251) == 1


def test_prefills_and_the_gone_count_nothing() -> None:
    shortage = Shortage()
    shortage.compressed(compression("a", 10, "prefill"), NEVER)
    shortage.compressed(compression("b", 10), NEVER)
    shortage.released("b")
    assert step(shortage, 0) == 0
