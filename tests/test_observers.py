# SPDX-License-Identifier: Apache-2.0
"""Who has an observation slot, and what is heard with it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import pytest

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.segments import DECODED

B = 16


def listening(observe_slots: int, *names: str) -> CompressionPlanner:
    """Packed requests of 1600 tokens that decode."""
    config = KVCompressConfig(policy="echo", ratio=None, budget_tokens=128, interval=4, window=8)
    p = CompressionPlanner(config, B, 8, observe_slots, 10_000)
    for name in names:
        p.admit(name, 1600)
        p.compressed(name, 1600)
    return p


def heard(p: CompressionPlanner, computed: Mapping[str, int]) -> list[tuple[str, int, int]]:
    return [(t.request_id, begin, end) for t, _, begin, end in p.observers.heard(computed)]


def test_segments_are_heard_once_they_are_whole_or_a_compression_is_due() -> None:
    p = listening(1, "a")
    assert p.requests["a"].due_at == 1664
    p.observers.listen({"a": 1600})
    assert p.observers.used == 0, "whoever listens would give its slot"
    (seen,) = p.observe(p.requests["a"], 1600, 1)
    assert seen.observe_from == 1600
    assert heard(p, {"a": 1615}) == []
    assert heard(p, {"a": 1633}) == [("a", 1600, 1616), ("a", 1616, 1632)]
    p.generations.watch({"a": 1656})
    assert p.observers.used == 1 and p.requests["a"].listen_slot is not None
    p.requests["a"].due_at = 1650
    assert heard(p, {"a": 1650}) == [("a", 1632, 1648), ("a", 1648, 1650)], "up to where it is due"


def test_a_single_token_is_not_heard() -> None:
    p = listening(1, "a")
    a = p.requests["a"]
    a.unscored.computed(1600, 1664, False)
    p.observers.listen({"a": 1615})
    assert heard(p, {"a": 1632}) == [("a", 1616, 1632)]
    assert a.listened == 1632 and a.unscored.before(1664) == ((1600, 1616), (1632, 1664))


def test_what_nobody_heard_is_kept_where_it_is_worth_a_block() -> None:
    p = listening(1, "a")
    a = p.requests["a"]
    for end, kept in ((1600 + B - 1, ()), (1600 + B, ((1600, 1600 + B),))):
        a.unscored.computed(1600, end, False)
        assert a.protect(1616 // B) == kept


def test_the_last_who_listens_gives_its_slot() -> None:
    p = listening(2, "a", "b", "c")
    computed = dict.fromkeys("abc", 1601)
    p.observers.listen(computed)
    listeners = [name for name, t in p.requests.items() if t.listen_slot is not None]
    assert listeners == ["a", "b"] and heard(p, computed | {"c": 1700}) == []
    p.admit("d", 1600)
    assert p.observers.used == 1 and p.requests["b"].listen_slot is None
    assert p.requests["a"].listen_slot is not None
    p.admit("e", 1600)
    assert p.observers.used == 2
    assert not p.newcomers.have_slots(p.newcomers.starting("f", 1600))
    slots = {p.requests[name].observe_slot for name in "de"}
    assert slots == {0, 1}
    for name in "de":
        p.release(name)
    p.observers.listen(computed | {"c": DECODED})
    assert [n for n, t in p.requests.items() if t.listen_slot is not None] == ["a", "b"]


def test_whoever_reads_its_prompt_does_not_listen() -> None:
    p = listening(2)
    p.admit("short", 100)
    p.admit("long", 1600)
    p.observers.listen({"short": 99, "long": 1600})
    assert [t.listen_slot for t in p.requests.values()] == [None, None]
    p.observers.listen({"short": 100})
    assert p.requests["short"].listen_slot is not None


def test_nobody_listens_while_its_compression_is_late() -> None:
    """What it decodes then is not observed, and would be scored by another's queries."""
    p = listening(1)
    p.admit("a", 1600)
    p.compressed("a", 1600)
    a = p.requests["a"]
    p.observers.stop(a)
    p.observers.listen({"a": a.due_at})
    assert a.listen_slot is None
    p.observers.listen({"a": a.due_at - 1})
    assert a.listen_slot is not None


def test_what_is_observed_of_a_generation_begins_where_it_was_counted_before() -> None:
    config = KVCompressConfig(policy="h2o", ratio=None, budget_tokens=128, interval=1, window=32)
    p = CompressionPlanner(config, B, 8, 2, 10_000)
    p.admit("a", 1600)
    p.compressed("a", 1600)
    a = p.requests["a"]
    seen = p.observed(a, a.due_at)
    assert a.due_at == 1616 and seen is not None and seen.num_queries == 16


def test_a_slot_that_is_promised_is_not_for_others() -> None:
    """By requests that would go on behind a segment which they take over in the step at hand."""
    config = KVCompressConfig(policy="echo", ratio=8, context_stride=1024)
    p = CompressionPlanner(config, B, 8, 4, 10_000)
    a, b, c, near = (p.newcomers.starting(name, 590, None) for name in "abcd")
    passes = functools.partial(p.observers.passes, starts=True, behind=2)
    assert passes(a, 512) and p.observers.available == 4, "needs no other"
    for _ in range(2):
        assert passes(a, 590) and p.observers.available == 3
    assert passes(b, 590) and p.observers.available == 2
    assert not passes(c, 590), "a quarter stays for who finds none"
    assert list(p.observers.heard({})) == [] and p.observers.available == 4, "another step"
    near.due_at = 592
    assert not passes(near, 590), "its slot is to observe other queries"


@pytest.mark.parametrize("behind, reading", [(0, 0), (1, 0), (0, 1)])
def test_the_last_slots_are_for_who_needs_one(behind: int, reading: int) -> None:
    """In this step: of those that wait to start, and of those that read their prompts."""
    config = KVCompressConfig(policy="echo", ratio=8, context_stride=1024)
    p = CompressionPlanner(config, B, 8, 4, 10_000)
    for index in range(reading):
        p.admit(f"reads {index}", 590)
    a, b = (p.newcomers.starting(name, 590, None) for name in "ab")
    assert p.observers.passes(a, 590, starts=True, behind=1)
    p.observers.take_over(a, 256)
    assert p.observers.passes(a, 590, starts=False, behind=9), "it has been promised"
    assert p.observers.passes(b, 590, starts=True, behind=behind) is (behind + reading == 0)
