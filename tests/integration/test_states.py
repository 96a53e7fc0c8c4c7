# SPDX-License-Identifier: Apache-2.0
"""Layers with a state in the place of keys beside compressed ones: blocks of several kernel blocks.

The pretend worker checks on every step that the states are there, and lets nothing lie in a block
beside them (:meth:`tests.integration.simulation.PretendWorker._update_states`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from kvcompress_vllm.integration.compat.releases import vllm_places_layers
from kvcompress_vllm.integration.engine.groups import compressed_group, span_of
from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec, cache_group
from kvcompress_vllm.integration.worker import states
from kvcompress_vllm.integration.worker.metadata import KVCompressMetadataBuilder
from kvcompress_vllm.integration.worker.placement import all_pages, packed_config
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.kernel_blocks import in_kernel_blocks, split
from kvcompress_vllm.records.plan import (
    Accumulation,
    Compression,
    Heard,
    Observed,
    PackedRow,
    Replay,
    Scoring,
    StepPlan,
)
from kvcompress_vllm.scheduling.local import State
from tests.integration.simulation import B, Simulation
from tests.integration.test_groups import check_accepted_finish, prompt

OPTIONS = {"policy": "kv_compress", "ratio": 4, "recent": 8, "sinks": 2, "min_tokens_per_head": 8,
           "window": 4, "min_prompt_tokens": 40, "interval": 2}  # fmt: skip
SHAPE = {"num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
K = 3
FULL = KVCompressSpec.of(
    FullAttentionSpec(**SHAPE, block_size=K * B), 4, 2, 0.25, kernel_block_size=B
)
MAMBA = MambaSpec(
    block_size=512, shapes=((5, 6), (3, 4, 7)), dtypes=(torch.bfloat16, torch.float32),
    page_size_padded=FULL.page_size_bytes,
)  # fmt: skip


def simulation(num_blocks: int, **changes: Any) -> Simulation:
    return Simulation(
        num_blocks, {**OPTIONS, **changes}, prefix_caching=False, states=2, kernel_blocks=K
    )


def test_blocks_of_all_groups_come_back() -> None:
    sim = simulation(40)
    sim.add("r", prompt(1, 330), 10)
    while not sim.num_compressions:
        sim.step()
    # 6 of 7 blocks of 48 tokens are full, and packed into 2; and 2 states.
    assert sim.pool.get_num_free_blocks() == 39 - 3 - 2
    assert sim.scheduler.kv_compress_others.held("r") == 2
    (item,) = sim.scheduler.kv_compress_planner.packed()
    assert item.packing == (6, 2)
    sim.run()
    assert sim.pool.get_num_free_blocks() == 39


def test_heads_share_what_is_kept_in_pages_of_a_kernel_block() -> None:
    """Fewer pages than a block, where a head has little worth keeping: the floor is one."""
    sim = simulation(40, min_tokens_per_head=1, recent=1)
    sim.add("r", prompt(1, 330), 10)
    while not sim.num_compressions:
        sim.step()
    pages = sim.worker.state.num_pages[sim.worker.state.slot_of(sim.worker.rows["r"])]
    assert int(pages.sum()) == 2 * K * pages.numel()
    assert (pages % K).any(), pages


def test_the_interval_is_in_kernel_blocks() -> None:
    """Of 8 of them, in blocks of 3, a generation outgrows its budget by 3 blocks, not by 8."""
    planner = simulation(40, interval=8).scheduler.kv_compress_planner
    assert planner.limits.interval == 3


def test_a_loss_curve_is_told_in_blocks() -> None:
    curve = LossCurve([2, 4, 9, 12], [0.8, 0.4, 0.1, 0.0])
    found = curve.in_blocks_of(3)
    assert found.blocks == [1, 2, 3, 4]
    assert found.lost == pytest.approx([0.6, 0.28, 0.1, 0.0])
    assert found.lost_at(4) == 0 and curve.in_blocks_of(1) is curve


@pytest.mark.parametrize("policy", ["kv_compress", "h2o", "echo"])
@pytest.mark.parametrize("mass", [False, True])
def test_policies_of_all_kinds(policy: str, mass: bool) -> None:
    options = {"ratio": None, "mass": 0.9} if mass else {}
    stride = {"query_stride": 12} if policy == "h2o" else {}
    sim = simulation(40, policy=policy, **options, **stride)
    for i in range(4):
        sim.add(f"r{i}", prompt(i, 300), 60)
    sim.run()
    assert sim.num_compressions >= 4 and not sim.failed
    assert all(len(answer) == 60 for answer in sim.outputs.values())
    assert sim.pool.get_num_free_blocks() == 39


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    st.integers(14, 40),
    st.integers(1, 3),
    st.sampled_from([2, 3, 5]),
    st.fixed_dictionaries(
        {"policy": st.sampled_from(["kv_compress", "echo"])},
        optional={
            "prefill_peak_tokens": st.sampled_from([256, 300]),
            "decode": st.booleans(),
            "on_pressure": st.just(True),
        },
    ),
    st.fixed_dictionaries(
        {
            "max_num_batched_tokens": st.sampled_from([96, 300]),
            "max_num_seqs": st.integers(1, 6),
            "asynchronous": st.booleans(),
        }
    ),
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.integers(1, 470),
            st.integers(1, 120),
            st.sampled_from(
                [{}, {}, {"kv_compress": False}, {"kv_compress_ratio": 1.5},
                 {"kv_compress_context_tokens": 160}, {"kv_compress_budget_tokens": 100},
                 {"kv_compress_protect": "20:90"}]
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 40),
)  # fmt: skip
def test_what_is_accepted_finishes(
    num_blocks: int,
    groups: int,
    kernel_blocks: int,
    changes: dict[str, Any],
    engine: dict[str, Any],
    requests: list[tuple[int, int, int, dict[str, Any]]],
    preempted_after: int,
) -> None:
    options = {**OPTIONS, "allow_policies": True, **changes}
    try:
        sim = Simulation(
            num_blocks, options, states=groups, kernel_blocks=kernel_blocks,
            prefix_caching=False, **engine,
        )  # fmt: skip
    except ValueError:
        reject()
    check_accepted_finish(sim, requests, preempted_after)


def test_states_stand_beside_blocks_of_any_size() -> None:
    assert compressed_group([MAMBA, FULL, MAMBA]) == 1
    assert span_of(MAMBA) == State(1)
    cached = MambaSpec(
        block_size=48, shapes=((5,),), dtypes=(torch.float32,), mamba_cache_mode="align"
    )
    with pytest.raises(ValueError, match="without prefix caching"):
        span_of(cached)


def test_the_spec_and_the_group_know_kernel_blocks() -> None:
    group = cache_group(FULL.merge([FULL, FULL]), 2)
    assert (group.block_size, group.kernel_blocks) == (B, K)
    assert group.block_bytes == 2 * FULL.page_size_bytes
    # As vLLM gives it to a metadata builder.
    assert cache_group(FULL.copy_with_new_block_size(B), 2).kernel_blocks == 1


@pytest.mark.skipif(vllm_places_layers(), reason="this vLLM views states right itself")
def test_states_and_pages_lie_in_one_buffer() -> None:
    """Every byte of a block is a page's or a state's of one layer at most, whoever has the block;
    and nothing reaches into the next block."""
    blocks, layers = 4, 2
    config = packed_config(
        KVCacheConfig(
            blocks,
            [],
            [
                KVCacheGroupSpec(["m0", "m1", "m2"], MAMBA),
                KVCacheGroupSpec(["a0", "a1"], FULL),
                KVCacheGroupSpec(["n0"], MAMBA),
            ],
        )
    )
    assert [tensor.shared_by for tensor in config.kv_cache_tensors] == [
        ["m0", "a0", "n0"], ["m1", "a1"], ["m2"]
    ]  # fmt: skip
    shared = config.kv_cache_tensors[0]
    buffer = torch.zeros(shared.size, dtype=torch.int8)
    # As vLLM views it: a block of a layer is one page for each head.
    block = buffer.view(torch.float32).view(blocks, -1)
    whole = block[:, : FULL.page_size_bytes // 4].view(blocks, 2, K * B, 64)
    beyond = [torch.zeros(blocks, 5, 6)]
    bound = {name: SimpleNamespace(kv_cache=None) for name in ("m0", "n0", "m1", "a1")}
    bound["a0"], bound["m2"] = SimpleNamespace(kv_cache=whole), SimpleNamespace(kv_cache=beyond)
    states.lay_out(bound, config)
    found = {name: layer.kv_cache for name, layer in bound.items()}
    assert found["m2"] is beyond
    block_bytes = shared.size // blocks
    assert found["a0"].shape == (blocks * K, 2, B, 64)
    assert [each.shape[1:] for each in found["m0"]] == [(5, 6), (3, 4, 7)]

    def touched(name: str, block: int) -> set[int]:
        """Bytes that a layer writes of a block."""
        buffer.zero_()
        views = found[name] if isinstance(found[name], list) else [found[name]]
        for view in views:
            own = slice(block * K, (block + 1) * K) if name.startswith("a") else block
            view[own] = torch.tensor(-1.9375, dtype=view.dtype)  # no byte of it is 0 in bfloat16
            if view.dtype is torch.float32:
                view[own].view(torch.int32).fill_(-1)
        return set(buffer.nonzero().flatten().tolist())

    for block in range(blocks):
        inside = set(range(block * block_bytes, (block + 1) * block_bytes))
        of_pages = [touched(f"a{layer}", block) for layer in range(layers)]
        assert not of_pages[0] & of_pages[1] and of_pages[0] | of_pages[1] == inside
        of_states = [touched("m0", block), touched("m1", block)]
        assert not of_states[0] & of_states[1] and of_states[0] | of_states[1] <= inside
        assert len(of_states[0]) == 5 * 6 * 2 + 3 * 4 * 7 * 4
        assert touched("n0", block) == of_states[0]
    # Our kernels read the same bytes as one list of pages.
    group = cache_group(FULL, layers)
    pages = all_pages(found["a0"], group)
    buffer.zero_()
    found["a1"][5, 1] = 7.0
    (page,) = pages.flatten(1).any(1).nonzero().tolist()
    assert page == [5 * group.pages_per_block + 1 * group.heads + 1]
    buffer.zero_()
    pages.fill_(1.0)
    states.BlockZeroer(pages, group).zero_block_ids([2])
    assert not buffer[2 * block_bytes : 3 * block_bytes].any()
    assert buffer[: 2 * block_bytes].any() and buffer[3 * block_bytes :].any()


@pytest.mark.skipif(vllm_places_layers(), reason="tensors of another kind")
def test_windows_beside_states_are_refused() -> None:
    sliding = SlidingWindowSpec(**SHAPE, block_size=K * B, sliding_window=40)
    config = packed_config(
        KVCacheConfig(
            2,
            [],
            [
                KVCacheGroupSpec(["a"], FULL),
                KVCacheGroupSpec(["m"], MAMBA),
                KVCacheGroupSpec(["s"], sliding),
            ],
        )
    )
    cache = torch.zeros(2, 2, K * B, 64)
    bound = {name: SimpleNamespace(kv_cache=cache) for name in "ams"}
    with pytest.raises(RuntimeError, match="cannot lie beside states"):
        states.lay_out(bound, config)
    bound["a"].kv_cache = torch.zeros(2, 3, 2, K * B, 64)[:, 0]
    with pytest.raises(RuntimeError, match="bytes apart"):
        states.lay_out(bound, config)


def test_a_plan_in_kernel_blocks() -> None:
    observed = Observed(4, 1, known=2, before=9)
    common = {"old_covered": 4, "old_kept": 2, "covered": 5, "old_blocks": [7, 3, 0, 0, 9, 1]}
    plan = StepPlan(
        accumulations=[Accumulation("a", 0, 1, 290, **common, observed=observed)],
        scorings=[Scoring("s", 0, 1, 290, **common, kept=2)],
        compressions=[Compression("c", 0, 1, 290, **common, new_blocks=[4, 8], floor_pages=5)],
        heard=[Heard("h", 0, 1, 2, [6])],
        expected=[PackedRow("c", 0, 5, [4, 8])],
    )
    found = in_kernel_blocks(plan, 3)
    (accumulation,), (scoring,), (compression,) = (
        found.accumulations, found.scorings, found.compressions
    )  # fmt: skip
    for item in (accumulation, scoring, compression):
        assert (item.old_covered, item.old_kept, item.covered) == (12, 6, 15)
        assert item.old_blocks[:7] == [21, 22, 23, 9, 10, 11, 0] and len(item.old_blocks) == 18
    assert accumulation.observed.known == 6 and scoring.kept == 6
    assert compression.new_blocks == [12, 13, 14, 24, 25, 26] and compression.floor_pages == 5
    assert found.heard[0].blocks == [18, 19, 20]
    assert found.expected[0].covered == 15 and found.expected[0].packed_blocks[-1] == 26
    assert plan.compressions[0].new_blocks == [4, 8], "others read the plan, too"
    assert in_kernel_blocks(plan, 1) is plan
    with pytest.raises(RuntimeError, match="repeated"):
        in_kernel_blocks(StepPlan(replays=[Replay("r", 0, 1, 1, [1], True)]), 3)


@pytest.mark.parametrize("buffer", [False, True])
def test_rows_of_kernel_blocks(buffer: bool) -> None:
    """In new tensors, and where captured graphs read them."""
    builder = object.__new__(KVCompressMetadataBuilder)
    builder.kernel_blocks, builder._parts = K, torch.arange(K, dtype=torch.int32)
    rows = torch.tensor([[6, 0, 2], [1, 5, 0]], dtype=torch.int32)
    out = torch.zeros(4, 9, dtype=torch.int32)[:2] if buffer else None
    found = builder.table(rows, out)
    assert found.tolist() == [split(row, K) for row in rows.tolist()]
    assert found.dtype is torch.int32
    assert out is None or found.data_ptr() == out.data_ptr()
    builder.kernel_blocks = 1
    assert builder.table(rows) is rows
