# SPDX-License-Identifier: Apache-2.0
"""What a planner makes of drafted tokens that a step in flight may still reject."""

from __future__ import annotations

import pytest

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.unverified import Unverified

WINDOW, DRAFTS = 8, 4


def decoding() -> CompressionPlanner:
    """One request of 320 tokens, packed at the end of its prompt."""
    config = KVCompressConfig(policy="kv_compress", ratio=4, window=WINDOW, recent=8, interval=2)
    planner = CompressionPlanner(
        config, 16, state_slots=2, observe_slots=1, max_tokens=1024, drafts=3 * DRAFTS
    )
    planner.admit("a", 320)
    assert planner.due({"a": 320})
    planner.compressed("a", 320)
    return planner


def test_counts() -> None:
    unverified = Unverified()
    unverified.sent({"a": [-1] * 4, "b": [-1]})
    unverified.sent({"a": [-1] * 3})
    assert (unverified["a"], unverified["b"], unverified["c"]) == (7, 1, 0)
    assert unverified.certain("a", 20) == 13 and unverified.certain("a", 5) == 0
    unverified.verified({"a": [1] * 4, "b": [1], "gone": [1] * 9})
    assert (unverified["a"], unverified["b"], unverified["gone"]) == (3, 0, 0)


@pytest.mark.parametrize("late", [0, DRAFTS])
def test_observation_begins_behind_what_is_in_flight(late: int) -> None:
    planner = decoding()
    planner.unverified.sent({"a": [-1] * late})
    tracked = planner.requests["a"]
    now = tracked.due_at + 30  # nobody had a slot for it
    planner.generations.watch({"a": now})
    assert tracked.observe_slot is not None and tracked.due_at == now + late + WINDOW


@pytest.mark.parametrize("late", [0, DRAFTS])
def test_so_it_does_under_pressure(late: int) -> None:
    planner = decoding()
    planner.unverified.sent({"a": [-1] * late})
    planner.generations.press({"a": 400}, 0)
    tracked = planner.requests["a"]
    assert tracked.trigger == "pressure" and tracked.due_at == 400 + late + WINDOW


def test_a_compression_that_was_late_is_followed_by_a_whole_window() -> None:
    planner = decoding()
    tracked = planner.requests["a"]
    planner.generations.watch({"a": tracked.due_at - WINDOW})
    planner.unverified.sent({"a": [-1] * DRAFTS})
    now = tracked.due_at + 200
    planner.compressed("a", now)
    assert tracked.due_at >= now + DRAFTS + WINDOW
