# SPDX-License-Identifier: Apache-2.0
"""The samples of the live page."""

from __future__ import annotations

import pytest

from kvcompress_vllm.reporting.history import (
    COLUMNS,
    LAST_REQUESTS,
    SECONDS,
    WAITS,
    Gauges,
    History,
)
from kvcompress_vllm.reporting.metrics import Compressed, Occupancy, Outcome, StepReport
from kvcompress_vllm.reporting.shared import SharedReport

PREFILL = Compressed("prefill", True, 20, 5, 21, 6)
DECODE = Compressed("decode", False, 12, 8, 12, 8)


def report(*compressions: Compressed, running: int = 0, used: int = 0) -> StepReport:
    occupancy = Occupancy(total_blocks=50, free_blocks=50 - used, running=running)
    return StepReport(list(compressions), occupancy=occupancy)


def rows(history: History, now: float, since: float = 0.0) -> list[dict[str, float | None]]:
    return [dict(zip(COLUMNS, row, strict=True)) for row in history.samples(since, now)]


def test_a_second_has_its_events_and_its_last_state() -> None:
    history = History([0], 100.5)
    history.record(0, report(PREFILL, running=3, used=9), 100.6)
    history.record(0, report(DECODE, PREFILL, running=2, used=7), 100.9)
    assert rows(history, 100.95) == [], "the second is not over"
    history.record(0, report(running=1), 101.1)
    (row,) = rows(history, 101.2)
    assert (row["time"], row["running"], row["used_blocks"]) == (101, 2, 7)
    assert (row["prefill"], row["decode"], row["pressure"]) == (2, 1, 0)
    assert row["kept_ratio"] == pytest.approx((5 + 8 + 5) / (20 + 12 + 20))
    assert history.gauges() == Gauges(running=1)


def test_idle_seconds_keep_the_state_and_have_no_events() -> None:
    history = History([0], 100.5)
    history.record(0, StepReport([PREFILL], packed_requests=4), 100.6)
    found = rows(history, 104.2)
    assert [row["time"] for row in found] == [101, 102, 103, 104]
    assert [row["packed_requests"] for row in found] == [4] * 4
    assert [row["prefill"] for row in found] == [1, 0, 0, 0]
    assert [row["kept_ratio"] for row in found] == [0.25, None, None, None]


def test_a_reader_asks_for_what_it_has_not_seen() -> None:
    history = History([0], 100.0)
    assert [row["time"] for row in rows(history, 105.5)] == [101, 102, 103, 104, 105]
    assert [row["time"] for row in rows(history, 105.5, since=103)] == [104, 105]
    assert [row["time"] for row in rows(history, 105.5, since=103.9)] == [104, 105]
    assert rows(history, 105.5, since=105) == [] == rows(history, 105.5, since=1e12)
    assert len(rows(history, 105.5, since=-1e300)) == 5


def test_it_is_bounded_and_always_contiguous() -> None:
    history = History([0], 0.0)
    for second in range(700):
        history.record(0, report(running=second), second + 0.5)
    found = rows(history, 700.0)
    assert [row["time"] for row in found] == list(range(101, 701)) and len(found) == SECONDS
    assert [row["running"] for row in found] == list(range(100, 700))
    found = rows(history, 1e6)
    assert [row["time"] for row in found] == list(range(10**6 - 599, 10**6 + 1))
    assert {row["running"] for row in found} == {699}
    assert rows(history, 999_000.0) == found, "a clock that is set back"


def test_engines_are_added_up() -> None:
    history = History([0, 1], 100.0)
    history.record(0, report(PREFILL, running=3, used=10), 100.1)
    history.record(1, report(DECODE, running=4, used=1), 100.2)
    assert history.num_engines == 2
    assert history.gauges() == Gauges(running=7, used_blocks=11)
    (row,) = rows(history, 101.0)
    assert (row["running"], row["prefill"], row["decode"]) == (7, 1, 1)


def test_totals() -> None:
    history = History([0], 100.0)
    assert history.totals.kept_ratio() is None
    for second in range(2000):
        history.record(0, report(PREFILL, DECODE), 100.0 + second)
    totals = history.totals
    assert totals.compressions == {"prefill": 2000, "decode": 2000, "pressure": 0}
    assert totals.compressed_requests == 2000 and totals.freed_blocks == 2000 * (15 + 4)
    assert totals.kept_ratio() == 13 / 32


def test_the_state_is_what_the_report_says() -> None:
    occupancy = Occupancy(100, 40, running=5, waiting=6, packed_blocks=30, cached_blocks=70)
    found = Gauges.of(StepReport(packed_requests=4, saved_blocks=90, occupancy=occupancy))
    assert found == Gauges(5, 6, 4, used_blocks=60, packed_blocks=30, saved_blocks=90,
                           cached_blocks=70)  # fmt: skip


def test_kept_pages_are_means_over_the_requests_of_all_engines() -> None:
    history = History([0, 1], 100.0)
    assert history.mean_kept_pages() == []
    history.record(0, StepReport(kept_pages=[[2, 4], [6, 8]], measured_requests=2), 100.1)
    assert history.mean_kept_pages() == [[1, 2], [3, 4]]
    history.record(1, StepReport(kept_pages=[[10, 0], [0, 4]], measured_requests=1), 100.2)
    assert history.mean_kept_pages() == [[4, 4 / 3], [2, 4]]
    for engine in (0, 1):
        history.record(engine, StepReport(), 100.3)
    assert history.mean_kept_pages() == []


def outcome(name: str, after: int = 9) -> Outcome:
    return Outcome(name, "prefill", 600, 37, after, 0.1, 2.5, [9, 9], 2, 36)


def test_why_requests_wait() -> None:
    history = History([0], 100.5)
    waiting = StepReport(
        refusals={"forecast": 2, "slots": 1}, reserve_waits=3, shared=SharedReport(waits=4)
    )
    history.record(0, waiting, 100.6)
    history.record(0, StepReport(refusals={"forecast": 1}), 100.7)
    first, second = rows(history, 102.1)
    assert [first[name] for name in WAITS] == [3, 1, 3, 4]
    assert [second[name] for name in WAITS] == [0] * 4
    assert history.totals.waits == dict(zip(WAITS, (3, 1, 3, 4), strict=True))


def test_requests_are_found_by_their_ids() -> None:
    history = History([0], 100.0)
    history.record(0, StepReport(outcomes=[outcome("cmpl-ab-0-12345678")]), 100.1)
    history.record(0, StepReport(outcomes=[outcome("cmpl-ab-1-12345679")]), 100.2)
    history.record(0, StepReport(outcomes=[outcome("cmpl-ab-0-12345678", after=7)]), 100.3)
    history.record(0, StepReport(outcomes=[outcome("chatcmpl-cd-12345678")]), 100.3)
    found = history.outcomes("cmpl-ab")
    assert list(found) == ["cmpl-ab-1-12345679", "cmpl-ab-0-12345678"]
    assert [item.after for item in found["cmpl-ab-0-12345678"]] == [9, 7]
    assert list(history.outcomes("cmpl-ab-1-12345679")) == ["cmpl-ab-1-12345679"]
    assert list(history.outcomes("chatcmpl-cd")) == ["chatcmpl-cd-12345678"]
    for other in ("", "c", "cmpl", "cmpl-", "cmpl-a", "cmpl-ab-0-1234567", "cmpl-ab-0-12345678-"):
        assert history.outcomes(other) == {}, other


def test_only_the_latest_requests_are_known() -> None:
    history = History([0], 100.0)
    for number in range(LAST_REQUESTS + 5):
        for _ in range(20 if number == 500 else 1):
            history.record(0, StepReport(outcomes=[outcome(f"request-{number:04}x")]), 100.1)
    assert history.outcomes("request-0004x") == {} != history.outcomes("request-0005x")
    assert len(history.outcomes("request-0500x")["request-0500x"]) == 16
