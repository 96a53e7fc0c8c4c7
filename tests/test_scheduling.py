# SPDX-License-Identifier: Apache-2.0
import pytest

from kvcompress_vllm.config import KVCompressConfig
from kvcompress_vllm.scheduling import CompressionPlanner, num_observe_slots


def planner(observe_slots: int = 2, **options: object) -> CompressionPlanner:
    config = KVCompressConfig.from_dict({"ratio": 4, "window": 8, **options})
    return CompressionPlanner(config, 16, state_slots=4, observe_slots=observe_slots)


def test_life_of_a_request() -> None:
    p = planner()
    p.admit("a", 1000)
    assert p.observe("a", 0, 512) is None  # does not reach the window
    first = p.observe("a", 512, 485)  # positions 512..996: the window starts at 992
    assert first is not None and (first.first_token, first.observe_from) == (512, 992)
    last = p.observe("a", 997, 3)
    assert last is not None and last.observe_slot == first.observe_slot
    assert p.due({"a": 999}) == []
    assert [t.request_id for t in p.due({"a": 1000})] == ["a"]
    assert p.packed() == []
    p.compressed("a")
    assert p.due({"a": 1001}) == [] and [t.request_id for t in p.packed()] == ["a"]
    assert p.observe("a", 1000, 1) is None
    assert p.take_released() == []
    slot = p.requests["a"].state_slot
    p.release("a")
    assert p.take_released() == [slot] and p.take_released() == []


def test_short_requests_are_not_tracked() -> None:
    p = planner()
    p.admit("a", 100)
    assert p.requests == {} and p.reserve() == 0
    p.release("a")
    assert p.take_released() == []


def test_admission_waits_for_an_observation_slot_but_never_for_short_prompts() -> None:
    p = planner(observe_slots=1)
    p.admit("a", 1000)
    assert not p.can_admit(1000) and p.can_admit(100)
    p.compressed("a")
    assert p.can_admit(1000)
    with pytest.raises(RuntimeError, match="compressed twice"):
        p.compressed("a")


def test_admitting_twice_or_without_slot_is_an_error() -> None:
    p = planner(observe_slots=1)
    p.admit("a", 1000)
    with pytest.raises(RuntimeError, match="tracked=True"):
        p.admit("a", 1000)
    with pytest.raises(RuntimeError, match="0 observation slots"):
        p.admit("b", 1000)


def test_reserve_is_the_largest_packed_copy_that_may_be_needed() -> None:
    p = planner()
    assert p.reserve() == 0 and p.reserve(1600) == 25
    p.admit("a", 3200)
    assert p.reserve() == 50 and p.reserve(1600) == 50
    p.compressed("a")
    assert p.reserve() == 0


def test_releasing_before_compression_gives_both_slots_back() -> None:
    p = planner(observe_slots=1)
    for name in "abcdefgh":
        p.admit(name, 1000)
        p.release(name)
    assert p.can_admit(1000)


def test_a_window_longer_than_the_prompt_observes_from_its_start() -> None:
    p = planner(window=512, min_prompt_tokens=1, recent=0, sinks=0)
    p.admit("a", 200)
    observation = p.observe("a", 0, 200)
    assert observation is not None and observation.observe_from == 0


def test_number_of_observation_slots_is_bounded() -> None:
    config = KVCompressConfig()
    assert num_observe_slots(config, 2048, 256) == 34
    assert num_observe_slots(config, 2048, 4) == 4
    assert num_observe_slots(config, 10**6, 1024) == 64
