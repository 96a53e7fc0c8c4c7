# SPDX-License-Identifier: Apache-2.0
"""Layers with a window beside compressed ones: rows, hits, and what is counted of both.

The pretend worker checks on every step that what a query sees through its windows is there, and is
what its hash says (:meth:`tests.integration.simulation.PretendWorker._check_windows`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    SlidingWindowSpec,
)

from kvcompress_vllm.integration.compat.releases import vllm_places_layers
from kvcompress_vllm.integration.engine.groups import compressed_group, span_of
from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec
from kvcompress_vllm.integration.worker.model_runner import RunnerV1, RunnerV2
from kvcompress_vllm.integration.worker.placement import packed_config
from kvcompress_vllm.scheduling.local import Local, LocalLayers
from tests.integration.simulation import B, Simulation

OPTIONS = {"policy": "kv_compress", "ratio": 4, "recent": 8, "sinks": 2, "min_tokens_per_head": 8,
           "window": 4, "min_prompt_tokens": 40, "interval": 2}  # fmt: skip
WINDOWS = (40, 100)
SHAPE = {"block_size": B, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
FULL = KVCompressSpec.of(FullAttentionSpec(**SHAPE), 4, 2, 0.25)
SLIDING = SlidingWindowSpec(**SHAPE, sliding_window=40)
CHUNKED = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)


def prompt(family: int, length: int) -> list[int]:
    return [family * 1000 + i % 97 for i in range(length)]


def check_accepted_finish(
    sim: Simulation, requests: list[tuple[int, int, int, dict[str, Any]]], preempted_after: int
) -> None:
    """Whatever is accepted of (family, prompt tokens, output tokens, asked for) is answered in
    full, though all are preempted after so many steps, and every block comes back."""
    wanted = {}
    for index, (family, length, count, asked) in enumerate(requests):
        try:
            sim.add(f"r{index}", prompt(family, length), count, **asked)
        except ValueError:
            continue
        wanted[f"r{index}"] = min(count, 512 - length)
    for _ in range(preempted_after):
        sim.step()
    sim.scheduler.reset_prefix_cache(reset_running_requests=True)
    sim.run(8000)
    assert {name: len(tokens) for name, tokens in sim.outputs.items()} == wanted
    assert sim.failed == set()
    assert sim.pool.get_num_free_blocks() == sim.pool.num_gpu_blocks - 1


def test_nothing_is_cached_in_any_group_after_a_compression() -> None:
    sim = Simulation(120, OPTIONS, windows=WINDOWS)
    sim.add("first", prompt(1, 200), 200)
    sim.run()
    answer = sim.outputs["first"]
    # It is computed over all keys, and caches what the first one's hashes say.
    sim.add("exact", prompt(1, 200) + answer, 2, kv_compress=False)
    sim.run()
    assert sim.num_cached_tokens == 192
    # So all of it is found, and (the worker checks) nothing of what the first one decoded.
    sim.add("third", prompt(1, 200) + answer, 2, kv_compress=False)
    sim.step()
    assert sim.num_cached_tokens == 192 + 384


def test_a_hit_ends_where_the_windows_of_all_groups_do() -> None:
    sim = Simulation(120, OPTIONS, windows=WINDOWS)
    sim.add("first", prompt(1, 321), 2, kv_compress=False)
    sim.run()
    stats = sim.scheduler.kv_cache_manager.make_prefix_cache_stats()
    # Of 320 cached tokens the last 4 before position 160 are observed: the blocks of the windows
    # of 40 and 100 tokens there are others than those at 320.
    sim.add("second", prompt(1, 321), 2, kv_compress_context_tokens=160)
    sim.step()
    assert sim.num_cached_tokens == 144
    sim.run()
    assert stats is not None and sim.num_compressions == 2


def test_blocks_of_all_groups_come_back() -> None:
    sim = Simulation(120, OPTIONS, windows=WINDOWS, prefix_caching=False)
    sim.add("r", prompt(1, 330), 10)
    while not sim.num_compressions:
        sim.step()
    # 5 packed blocks and the partial one; windows that end at 331 begin in blocks 18 and 14.
    assert sim.pool.get_num_free_blocks() == 119 - 6 - 3 - 7
    others = sim.scheduler.kv_compress_others
    assert others.held("r") == 10
    occupancy = sim.reports[-1].occupancy
    sim.step()
    occupancy = sim.reports[-1].occupancy
    assert occupancy.packed_blocks == occupancy.total_blocks - occupancy.free_blocks
    sim.run()
    assert sim.pool.get_num_free_blocks() == 119


def test_pressure_counts_what_windows_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    sim = Simulation(60, {**OPTIONS, "window": 8}, windows=(60,))
    others, planner = sim.scheduler.kv_compress_others, sim.scheduler.kv_compress_planner
    free: list[int] = []
    generations = planner.generations
    monkeypatch.setattr(generations, "press", lambda computed, num_free: free.append(num_free))
    sim.add("r", prompt(1, 20), 150)
    sim.step()
    for _ in range(140):
        running = sim.scheduler.running
        computed = {r.request_id: r.num_computed_tokens for r in running}
        expected = sim.pool.get_num_free_blocks() - others.growth(computed, 8)
        sim.step()
        assert free[-1] == expected
    sim.run()


@pytest.mark.parametrize("drafts", [0, 5])
@pytest.mark.parametrize("spec", [SLIDING, CHUNKED], ids=["window", "chunks"])
def test_growth_is_what_comes(spec: Any, drafts: int) -> None:
    """Counted token by token."""
    layers = LocalLayers([span_of(spec)], B, in_flight=128, drafts=drafts)
    local = layers.groups[0]
    for now in range(1, 200):
        ahead = [local.held(now + more, B, drafts) for more in range(31)]
        assert layers.growth(now, 30) == max(ahead) - local.held(now, B)
        assert max(ahead) <= layers.decoding(now + 30)


@pytest.mark.parametrize("window", [33, 60])
def test_windows_hold_what_is_counted(window: int) -> None:
    sim = Simulation(60, OPTIONS, windows=(window,), prefix_caching=False)
    sim.add("r", prompt(1, 20), 150)
    sim.step()
    local = span_of(
        sim.scheduler.kv_cache_manager.coordinator.single_type_managers[0].kv_cache_spec
    )
    while sim.live:
        sim.step()
        if sim.live:
            tokens = sim.scheduler.requests["r"].num_computed_tokens
            held = sim.scheduler.kv_compress_others.held("r")
            assert held == local.held(tokens, B), tokens


def test_admission_counts_what_windows_will_hold() -> None:
    """A forecast that left them out would let in what must be preempted later."""
    sim = Simulation(64, {**OPTIONS, "on_pressure": False}, prefix_caching=False, windows=(200,))
    for i in range(20):
        sim.add(f"r{i}", prompt(i, 200), 100)
    sim.run()
    assert sim.most_running > 1 and sim.num_preemptions == 0


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(1, 470),
        st.integers(1, 120),
        st.sampled_from(
            [{}, {}, {"kv_compress": False}, {"kv_compress_ratio": 1.5},
             {"kv_compress_context_tokens": 160}, {"kv_compress_budget_tokens": 100}]
        ),
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(
    st.integers(30, 130),
    st.sampled_from([(16,), (40,), (300,), (40, 100)]),
    st.fixed_dictionaries(
        {"policy": st.sampled_from(["kv_compress", "echo"])},
        optional={
            "prefill_peak_tokens": st.sampled_from([256, 300]),
            "decode": st.booleans(),
            "on_pressure": st.just(True),
            "page_dtype": st.just("int4"),
        },
    ),
    st.fixed_dictionaries(
        {
            "max_num_batched_tokens": st.sampled_from([16, 64, 300]),
            "max_num_seqs": st.integers(1, 6),
            "prefix_caching": st.booleans(),
            "asynchronous": st.booleans(),
        }
    ),
    REQUESTS,
    st.integers(0, 40),
)
@example(
    40, (40,), {"policy": "kv_compress", "prefill_peak_tokens": 256},
    {"max_num_batched_tokens": 16, "max_num_seqs": 2, "prefix_caching": True,
     "asynchronous": True},
    [(0, 470, 40, {}), (0, 470, 9, {"kv_compress_ratio": 1.5})], 3,
)  # fmt: skip
def test_what_is_accepted_finishes(
    num_blocks: int,
    windows: tuple[int, ...],
    changes: dict[str, Any],
    engine: dict[str, Any],
    requests: list[tuple[int, int, int, dict[str, Any]]],
    preempted_after: int,
) -> None:
    options = {**OPTIONS, "allow_policies": True, **changes}
    try:
        sim = Simulation(num_blocks, options, windows=windows, **engine)
    except ValueError:
        reject()
    check_accepted_finish(sim, requests, preempted_after)


def groups(*parts: tuple[Any, int]) -> list[KVCacheGroupSpec]:
    return [
        KVCacheGroupSpec([f"{index}.{layer}" for layer in range(count)], spec)
        for index, (spec, count) in enumerate(parts)
    ]


def test_the_group_with_full_attention_is_compressed() -> None:
    assert compressed_group([SLIDING, FULL, SLIDING]) == 1
    with pytest.raises(ValueError, match="into 2 KV cache groups, beside 1 of other"):
        compressed_group([FULL, SLIDING, FULL])
    with pytest.raises(ValueError, match="into 0 KV cache groups"):
        compressed_group([SLIDING])
    other = SlidingWindowSpec(**{**SHAPE, "block_size": 32}, sliding_window=40)
    with pytest.raises(ValueError, match=r"blocks of \[16, 32\] tokens"):
        compressed_group([FULL, other])


def test_layers_of_two_kinds_are_not_alike() -> None:
    """vLLM asks by an AssertionError; whichever layer comes first."""
    for specs in ([FULL, SLIDING], [SLIDING, FULL]):
        with pytest.raises(AssertionError):
            specs[0].merge(specs)


@pytest.mark.skipif(vllm_places_layers(), reason="this vLLM lays layers out itself")
@pytest.mark.parametrize("counts", [(2, 2), (2, 3), (3, 2)], ids=["alike", "more", "fewer"])
def test_blocks_of_all_groups_are_the_same_bytes(counts: tuple[int, int]) -> None:
    """Layer i of each group in one place, and no byte in two places: by writing all of them."""
    full, local = counts
    layer_bytes = FULL.page_size_bytes
    config = packed_config(KVCacheConfig(5, [], groups((SLIDING, local), (FULL, full))))
    buffers: dict[int, torch.Tensor] = {}
    views: dict[str, torch.Tensor] = {}
    for index, tensor in enumerate(config.kv_cache_tensors):
        key = -1 if tensor.block_stride else index
        buffer = buffers.setdefault(key, torch.zeros(tensor.size, dtype=torch.int8))
        pages = buffer.view(5, tensor.block_stride or layer_bytes)
        pages = pages[:, tensor.offset : tensor.offset + layer_bytes]
        views |= dict.fromkeys(tensor.shared_by, pages)
    assert sorted(views) == sorted(n for group in config.kv_cache_groups for n in group.layer_names)
    assert sum(len(buffer) for buffer in buffers.values()) == 5 * layer_bytes * max(counts)
    assert len(buffers[-1]) == 5 * layer_bytes * full  # pages side by side: what our kernels need
    for index in range(max(counts)):
        for group in (0, 1):
            if index < (local, full)[group]:
                views[f"{group}.{index}"][2] = index + 1
    for index in range(max(counts)):
        for group in (0, 1):
            if index < (local, full)[group]:
                assert views[f"{group}.{index}"][2].eq(index + 1).all()
    assert all(int(view[[0, 1, 3, 4]].count_nonzero()) == 0 for view in views.values())


@pytest.mark.skipif(not vllm_places_layers(), reason="this vLLM has the worker place layers")
@pytest.mark.parametrize("counts", [(2, 2), (2, 3), (3, 2)], ids=["alike", "more", "fewer"])
def test_layers_beyond_the_compressed_ones_lie_behind_all_blocks(counts: tuple[int, int]) -> None:
    """The same where vLLM places layers by distances, and would leave a gap in ours."""
    full, local = counts
    layer_bytes, blocks = FULL.page_size_bytes, 5
    size = blocks * layer_bytes * max(counts)
    whole: Any = {"layers": [], "layer_stride": 0, "block_stride": 0}
    found = groups((SLIDING, local), (FULL, full))
    config = packed_config(KVCacheConfig(blocks, [KVCacheTensor(size=size, **whole)], found))
    owners: dict[str, dict[int, tuple[int, int]]] = {}
    for tensor in config.kv_cache_tensors:
        assert tensor.size == size
        for place, name in enumerate(tensor.layers):
            begins = [
                tensor.offset + place * tensor.layer_stride + block * tensor.block_stride
                for block in range(blocks)
            ]
            assert max(begins) + layer_bytes <= size
            owners[name] = {begin: (int(name[2:]), block) for block, begin in enumerate(begins)}
    assert sorted(owners) == sorted(name for group in found for name in group.layer_names)
    # Of a place in memory all groups say the same: which layer of which block.
    said: dict[int, tuple[int, int]] = {}
    for places in owners.values():
        assert all(said.setdefault(begin, owner) == owner for begin, owner in places.items())
    assert len(said) == blocks * max(counts)
    for block in range(blocks):  # pages side by side: what our kernels need
        assert [said[(block * full + i) * layer_bytes] for i in range(full)] == [
            (i, block) for i in range(full)
        ]


def test_a_stage_without_full_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer stages"):
        packed_config(KVCacheConfig(5, [], groups((SLIDING, 3), (FULL, 0))))


def test_rows_of_the_compressed_group_are_rewritten() -> None:
    rows = [torch.arange(6).view(1, 6).int() for _ in range(3)]
    numpy = [SimpleNamespace(block_table=SimpleNamespace(np=row.numpy())) for row in rows]
    state = SimpleNamespace(block_ids=tuple(list(range(6)) for _ in range(3)))
    runner = SimpleNamespace(
        requests={"r": state},
        input_batch=SimpleNamespace(req_id_to_index={"r": 0}, block_table=numpy),
        attn_groups=[[SimpleNamespace(metadata_builders=[index])] for index in range(3)],
    )
    v1 = RunnerV1(runner, 1)
    v1.write_row_prefixes({"r": [9, 0]})
    packed, whole = [9, 0, 2, 3, 4, 5], list(range(6))
    assert [row[0].tolist() for row in rows] == [whole, packed, whole]
    assert state.block_ids == (whole, packed, whole)
    assert list(v1.metadata_builders()) == [1]

    rows = [torch.arange(6).view(1, 6).int() for _ in range(3)]
    runner = SimpleNamespace(
        block_tables=SimpleNamespace(block_tables=[SimpleNamespace(gpu=row) for row in rows]),
        req_states=SimpleNamespace(req_id_to_index={"r": 0}),
        model_state=SimpleNamespace(prepare_attn=None),
    )
    RunnerV2(runner, 2).write_row_prefixes({"r": [9, 0]})
    assert [row[0].tolist() for row in rows] == [whole, whole, packed]


def test_what_layers_see() -> None:
    assert span_of(SLIDING) == Local(39)
    assert span_of(CHUNKED) == Local(64, aligned=True)
    with pytest.raises(ValueError, match="cannot stand beside"):
        span_of(CrossAttentionSpec(**SHAPE))


@pytest.mark.parametrize("spec", [SLIDING, SlidingWindowSpec(**SHAPE, sliding_window=33)])
@pytest.mark.parametrize("length", [1, 40, 300, 5000])
def test_windows_hold_no_more_than_vllm_makes_sure_of(spec: Any, length: int) -> None:
    layers = LocalLayers([span_of(spec)], B, in_flight=128)
    assert layers.most(length) <= spec.max_admission_blocks_per_request(
        max_in_flight_tokens=128, max_model_len=5000
    )
    assert layers.decoding(length) <= layers.most(length)
