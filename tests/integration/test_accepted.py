# SPDX-License-Identifier: Apache-2.0
"""Whatever the front end accepts finishes alone in an empty pool, and nothing raises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st

from tests.integration.simulation import B, Simulation

LONGEST = 512
BUDGETS = st.one_of(
    st.sampled_from([1, 1.5, 4, 16]).map(lambda ratio: {"ratio": ratio}),
    st.sampled_from([32, 100, 300]).map(lambda tokens: {"budget_tokens": tokens}),
    st.sampled_from([0.3, 0.9, 0.999, 1]).map(lambda mass: {"mass": mass}),
)
POLICIES = st.sampled_from(
    ["auto", "echo", "kv_compress", "h2o", "roco", "scissorhands", "tova", "random"]
)
OPTIONS = st.tuples(
    BUDGETS,
    st.fixed_dictionaries(
        {"min_prompt_tokens": st.sampled_from([1, 40, 300]), "policy": POLICIES},
        optional={
            "prefill_peak_tokens": st.sampled_from([256, 257, 300]),
            "query_stride": st.sampled_from([1, 3, 8]),
            "window": st.sampled_from([1, 4, 20]),
            "recent": st.sampled_from([0, 8, 60]),
            "min_tokens_per_head": st.sampled_from([0, 8, 40]),
            "min_budget_tokens": st.sampled_from([0, 100]),
            "interval": st.integers(1, 8),
            "decode": st.booleans(),
            "on_pressure": st.booleans(),
            "min_ratio": st.sampled_from([1, 1.5, 3]),
            "max_ratio": st.sampled_from([4, 20]),
            "allow_policies": st.just(True),
            "allocator": st.sampled_from(["global", "layer", "uniform"]),
            "page_dtype": st.sampled_from(["fp8", "int4"]),
        },
    ),
).map(lambda parts: {**parts[0], **parts[1]})
ASKED = st.one_of(
    st.just({}),
    st.just({"kv_compress": False}),
    st.tuples(
        st.one_of(
            st.just({}),
            BUDGETS.map(lambda asked: {f"kv_compress_{k}": v for k, v in asked.items()}),
        ),
        st.fixed_dictionaries(
            {},
            optional={
                "kv_compress_context_tokens": st.integers(1, 450),
                "kv_compress_protect": st.sampled_from(
                    ["0:30", "10:20,90:140", "0:400", "300:900"]
                ),
                "kv_compress_policy": POLICIES.filter(lambda name: name != "auto"),
            },
        ),
    ).map(lambda parts: {**parts[0], **parts[1]}),
)
REQUESTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 470), st.integers(1, 120), ASKED),
    min_size=1,
    max_size=5,
)
ENGINES = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(16, 50),
        "max_num_batched_tokens": st.sampled_from([8, 16, 50, 200, 300]),
        "max_num_seqs": st.integers(1, 6),
        "prefix_caching": st.booleans(),
        "asynchronous": st.booleans(),
    }
)


def prompt(family: int, length: int) -> list[int]:
    return [family * 1000 + i % 97 for i in range(length)]


def send(sim: Simulation, name: str, request: tuple[int, int, int, dict[str, Any]]) -> int:
    """Tokens that the request will generate; 0: it was refused."""
    family, length, max_tokens, asked = request
    try:
        sim.add(name, prompt(family, length), max_tokens, **asked)
    except ValueError:
        return 0
    return min(max_tokens, LONGEST - length)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(ENGINES, OPTIONS, REQUESTS)
@example(  # a protected range longer than the peak
    {"num_blocks": 30, "max_num_batched_tokens": 200, "max_num_seqs": 4},
    {"ratio": 4, "prefill_peak_tokens": 256, "min_prompt_tokens": 40},
    [(0, 470, 9, {"kv_compress_protect": "0:400"}), (1, 470, 9, {})],
)
@example(  # a mass asked of a server whose policy has none
    {"num_blocks": 40, "max_num_batched_tokens": 200, "max_num_seqs": 4},
    {"policy": "roco", "query_stride": 8, "ratio": 4, "min_prompt_tokens": 40},
    [(0, 400, 9, {"kv_compress_mass": 0.9})],
)
@example(  # the prompt keeps more than half of the peak
    {"num_blocks": 26, "max_num_batched_tokens": 200, "max_num_seqs": 4},
    {"ratio": 2.1, "prefill_peak_tokens": 256, "min_prompt_tokens": 40, "interval": 1},
    [(0, 440, 60, {})],
)
@example(  # a peak leaves less of the prompt than its mass is expected to keep
    {"num_blocks": 45, "max_num_batched_tokens": 8, "max_num_seqs": 2, "asynchronous": True},
    {
        "ratio": 4,
        "min_prompt_tokens": 1,
        "prefill_peak_tokens": 256,
        "min_tokens_per_head": 0,
        "decode": True,
        "recent": 0,
        "interval": 1,
        "on_pressure": True,
        "max_ratio": 4,
        "allow_policies": True,
    },
    [
        (
            0,
            355,
            102,
            {
                "kv_compress_mass": 0.999,
                "kv_compress_policy": "tova",
                "kv_compress_protect": "300:900",
                "kv_compress_context_tokens": 414,
            },
        ),
        (1, 55, 64, {}),
    ],
)
@example(  # packed in 8 bits, which drops no key, before the shields are full
    {"num_blocks": 16, "max_num_batched_tokens": 16, "max_num_seqs": 1},
    {"ratio": 1, "min_prompt_tokens": 1, "page_dtype": "fp8", "recent": 60},
    [(0, 33, 1, {"kv_compress_context_tokens": 32}), (0, 66, 40, {})],
)
@example(  # one that needs no echo scores finds blocks without, where others may ask for them
    {"num_blocks": 16, "max_num_batched_tokens": 200, "max_num_seqs": 2},
    {"ratio": 1.5, "min_prompt_tokens": 1, "policy": "random", "allow_policies": True},
    [(1, 98, 114, {"kv_compress": False}), (1, 67, 73, {})],
)
def test_what_is_accepted_finishes(
    engine: dict[str, Any],
    options: dict[str, Any],
    requests: list[tuple[int, int, int, dict[str, Any]]],
) -> None:
    try:
        sim = Simulation(options=options, max_model_len=LONGEST, **engine)
    except ValueError:
        reject()
    wanted = {}
    for index, request in enumerate(requests):
        wanted[f"alone{index}"] = send(sim, f"alone{index}", request)
        sim.run(2000)
    for index, request in enumerate(requests):
        wanted[f"r{index}"] = send(sim, f"r{index}", request)
    sim.run(8000)
    assert {name: len(tokens) for name, tokens in sim.outputs.items()} == {
        name: count for name, count in wanted.items() if count
    }
    assert sim.pool.get_num_free_blocks() == sim.pool.num_gpu_blocks - 1
    assert sim.scheduler.kv_compress_planner.requests == {}
    assert sim.scheduler.kv_compress_planner.observers.used == 0


@pytest.mark.parametrize("policy", ["h2o", "scissorhands"])
def test_steps_below_a_block_observe_nothing(policy: str) -> None:
    options = {"policy": policy, "query_stride": 4}
    with pytest.raises(ValueError, match=r"must reach the block size of 16 tokens, and one is 8"):
        Simulation(40, options, max_num_batched_tokens=8)
    with pytest.raises(ValueError, match=r"at least 23 \(16, and 1 for each of 7 others\)"):
        Simulation(40, options, max_num_batched_tokens=B)
    sim = Simulation(40, options, max_num_batched_tokens=B, max_num_seqs=1)
    sim.add("r", prompt(0, 300), 3)
    sim.run()
    assert sim.num_compressions == 1
