# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import Wish
from kvcompress_vllm.scheduling.admission import (
    HORIZON,
    UNBOUNDED,
    Load,
    OutputLength,
    at_most_blocks,
    counted_twice,
    load,
    most_blocks,
)
from kvcompress_vllm.scheduling.planner import CompressionPlanner

B = 16
CONFIG = KVCompressConfig(policy="kv_compress", budget_tokens=128, interval=4, window=16)
PLANNER = CompressionPlanner(CONFIG, B, 8, 8, max_tokens=10_000)


def held(one: Load, step: int) -> int:
    """What a request holds, step by step."""
    if step < one.prefill_steps:
        return one.prompt
    decoded = step - one.prefill_steps
    if decoded >= one.tokens_left:
        return 0
    blocks = one.start
    for _ in range(decoded // B):
        blocks += 1
        if blocks > one.most:
            blocks -= one.interval
    return blocks


LOADS = st.builds(
    Load,
    prefill_steps=st.integers(0, 4),
    prompt=st.integers(1, 60),
    start=st.integers(1, 20),
    most=st.integers(20, 30) | st.just(UNBOUNDED),
    interval=st.integers(1, 9),
    tokens_left=st.integers(1, 400),
)


@given(st.lists(LOADS, min_size=1, max_size=6))
def test_the_forecast_is_the_worst_step_ahead(loads: list[Load]) -> None:
    horizon = max(one.prefill_steps + one.tokens_left for one in loads)
    expected = max(sum(held(one, step) for one in loads) for step in range(horizon))
    assert most_blocks(loads, B, horizon, stride=1) == expected
    # With fewer samples a peak between two of them is missed, never invented.
    assert most_blocks(loads, B, horizon) <= expected
    assert expected <= at_most_blocks(loads, B, horizon)
    assert most_blocks(loads, B) <= at_most_blocks(loads, B)


def test_the_forecast_ends_somewhere() -> None:
    grows = Load(0, 0, 6, UNBOUNDED, 8, 100_000)
    assert most_blocks([grows], B) == 6 + HORIZON // B - 1


def test_nothing_holds_nothing() -> None:
    assert most_blocks([], B) == 0


def test_a_prompt_is_full_while_it_prefills_and_packed_afterwards() -> None:
    one = load(PLANNER.newcomers, None, 0, 6000, 500, max_batched_tokens=2048)
    assert one == Load(3, 375, 8, 8 + 4, 4, 500)


def test_a_prompt_that_is_read_within_a_peak_holds_that_and_a_copy() -> None:
    config = KVCompressConfig(ratio=4, prefill_peak_tokens=320)
    planner = CompressionPlanner(config, B, 8, 8, max_tokens=10_000)
    assert load(planner.newcomers, None, 0, 6000, 500, 2048).prompt == 20 + 10
    assert load(planner.newcomers, None, 0, 400, 500, 2048).prompt == 25, "it has no more"


def test_what_is_decoded_grows_from_where_it_is() -> None:
    PLANNER.admit("a", 1600)
    PLANNER.compressed("a")
    one = load(PLANNER.newcomers, PLANNER.requests["a"], 1640, 1641, 60, max_batched_tokens=2048)
    assert one == Load(0, 103, 8 + 3, 8 + 4, 4, 60)
    PLANNER.release("a")


def test_without_decode_compression_a_request_grows_without_bound() -> None:
    planner = CompressionPlanner(
        KVCompressConfig(ratio=4, decode=False), B, 8, 8, max_tokens=10_000
    )
    assert load(planner.newcomers, None, 0, 1600, 60, 2048) == Load(1, 100, 25, UNBOUNDED, 8, 60)
    assert load(planner.newcomers, None, 0, 20, 60, 2048) == Load(1, 2, 2, UNBOUNDED, 8, 60)


def test_output_lengths_are_learnt_from_finished_requests() -> None:
    lengths = OutputLength()
    assert lengths.left(0, 10_000) == 512 and lengths.left(0, 16) == 16
    for _ in range(100):
        lengths.finished(40)
    assert lengths.left(0, 10_000) == 40 and lengths.left(30, 10_000) == 10
    assert lengths.left(400, 10_000) == 100  # outlived the guess
    assert lengths.left(400, 400) == 1


def test_the_forecast_knows_that_compressions_wait_for_observation_slots() -> None:
    alone = load(PLANNER.newcomers, None, 0, 6000, 500, 2048)
    # 128 requests take turns at 8 slots, a window of 16 tokens each: every 16 blocks, not every 4.
    among_many = load(PLANNER.newcomers, None, 0, 6000, 500, 2048, num_requests=128)
    assert alone.interval == 4
    assert among_many == alone._replace(most=alone.most + 12, interval=16)


def test_the_forecast_knows_that_nobody_hears_what_is_decoded_without_a_slot() -> None:
    """Echo scores: it is kept, so a request grows on. Who listens by now falls back as usual."""
    echo = KVCompressConfig(policy="echo", budget_tokens=128, interval=4, window=16)
    planner = CompressionPlanner(echo, B, 8, 3, max_tokens=10_000)

    def most(tracked=None, num_requests=4) -> int:
        found = load(planner.newcomers, tracked, 0, 1000, 500, 512, num_requests=num_requests)
        return found.most

    assert most(num_requests=3) == load(PLANNER.newcomers, None, 0, 1000, 500, 512).most
    assert most() == UNBOUNDED
    planner.admit("a", 1000)
    tracked = planner.requests["a"]
    assert most(tracked) == UNBOUNDED
    tracked.listen_slot = 0
    assert most(tracked) == most(num_requests=3)


def test_with_a_stride_a_request_falls_at_its_marks_and_nowhere_else() -> None:
    config = KVCompressConfig(ratio=4, interval=4, context_stride=512)
    planner = CompressionPlanner(config, B, 8, 8, max_tokens=10_000)
    # 1,200 tokens are packed at 1,024: 16 of 64 blocks, and 11 behind. At 1,536 it holds 48.
    one = load(planner.newcomers, None, 0, 1200, 500, 2048)
    assert one == Load(1, 75, 16 + 11, 16 + 32, 48 - 24, 500)
    planner.admit("a", 1200)
    assert load(planner.newcomers, planner.requests["a"], 0, 1200, 500, 2048) == one
    short = load(planner.newcomers, None, 0, 100, 500, 2048)
    assert short == Load(1, 7, 7, 32, 32 - 8, 500)


def test_blocks_of_a_context_count_once_among_those_who_will_not_pack_anew() -> None:
    planner = CompressionPlanner(KVCompressConfig(ratio=4, interval=4), B, 8, 8, 10_000, 2)
    budget = resolve(planner.config, Wish(context_tokens=800))
    planner.admit("a", 900, budget, wanted={800: b"key"})
    (a,) = planner.due({"a": 800})
    context = planner.new_context(a)
    assert context is not None and context.packing == (50, 13)
    planner.contexts.add(context, range(1, 14))
    planner.compressed("a", 800, context)
    for name in ("b", "c"):
        planner.admit(name, 900, budget, context)
    until = a.due_at - 900
    users = [planner.requests[name] for name in "abc"]

    def twice(*tokens_left: int) -> int:
        loads = [Load(0, 20, 20, UNBOUNDED, 4, left) for left in tokens_left]
        return counted_twice((t, 900, one) for t, one in zip(users, loads, strict=True))

    assert twice(until, until, until) == 2 * 13
    assert twice(until, until, until + 1) == 13, "the third will have blocks of its own"
    assert twice(until, until + 1, until + 1) == 0
    assert counted_twice([(None, 900, Load(0, 20, 20, UNBOUNDED, 4, 1))]) == 0
