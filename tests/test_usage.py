# SPDX-License-Identifier: Apache-2.0
"""What a response says about its compressions."""

from __future__ import annotations

from dataclasses import replace

from kvcompress_vllm.records.plan import Compression
from kvcompress_vllm.reporting.usage import CompressionUsage, Counts, UsageLog

FIRST = Compression("r", 0, 0, 330, 0, 0, 20, list(range(1, 22)), [90] * 5)
"""20 of 21 blocks are packed into 5."""
SECOND = Compression("r", 0, 0, 500, 20, 5, 31, [90] * 5 + [0] * 15 + [1] * 12, [91] * 6)


def test_a_request_that_is_compressed_twice() -> None:
    log = UsageLog()
    assert not log
    log.compressed(FIRST)
    assert log and log.take("other") is None
    assert log.take("r") == Counts(1, 21, 6)
    assert not log and log.take("r") is None, "sent once"
    log.compressed(SECOND)
    assert log.take("r") == Counts(2, 32, 7), "32 is what it would hold uncompressed"


def test_before_it_is_sent_the_latest_replaces_the_former() -> None:
    log = UsageLog()
    log.compressed(FIRST)
    log.compressed(SECOND)
    assert log.take("r") == Counts(2, 32, 7)


def test_what_ended_is_forgotten() -> None:
    log = UsageLog()
    log.compressed(FIRST)
    log.compressed(replace(FIRST, request_id="s"))
    log.keep({"s"})
    assert log.take("r") is None and log.take("s") == Counts(1, 21, 6)
    log.keep(())
    log.compressed(replace(FIRST, request_id="s"))
    assert log.take("s") == Counts(1, 21, 6)


def test_sequences_are_added_up() -> None:
    usage = CompressionUsage()
    usage.add(Counts(1, 21, 6))
    usage.add(Counts(1, 20, 5))
    usage.add(Counts(2, 32, 7), old=Counts(1, 21, 6))
    assert usage == CompressionUsage(3, 52, 12)


def test_drafted_tokens() -> None:
    """They are counted before anything is compressed, and beside it."""
    log = UsageLog()
    log.verified("r", 4, 1)
    assert log.take("r") == Counts(draft_tokens=4, accepted_tokens=1)
    log.compressed(FIRST)
    log.verified("r", 3, 3)
    first = log.take("r")
    assert first == Counts(1, 21, 6, draft_tokens=7, accepted_tokens=4)
    log.verified("r", 2, 0)
    second = log.take("r")
    assert second == first._replace(draft_tokens=9)
    usage = CompressionUsage()
    usage.add(first)
    usage.add(second, old=first)
    assert (usage.draft_tokens, usage.accepted_tokens) == (9, 4)
