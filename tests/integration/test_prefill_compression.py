# SPDX-License-Identifier: Apache-2.0
"""Compression in the middle of a prompt, and protected ranges, on vLLM's real scheduler."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.frontend.requests import check_length, check_request
from kvcompress_vllm.ops.reference.rows import State
from tests.integration.simulation import B, D, H, L, Simulation, numbers


def prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 1000) for _ in range(length)]


def held(sim: Simulation) -> int:
    return sim.pool.num_gpu_blocks - 1 - sim.pool.get_num_free_blocks()


def positions(sim: Simulation, request_id: str) -> list[torch.Tensor]:
    """Of every head of a request, the positions whose keys it holds."""
    manager, state = sim.scheduler.kv_compress_manager, sim.worker.state
    row = manager.row(request_id, len(manager.req_to_blocks[request_id]))
    slot = state.slot_of(row)
    n = sim.scheduler.requests[request_id].num_computed_tokens
    heads = [
        State(*state.tables).head(torch.tensor(row), slot, *divmod(head, H))
        for head in range(L * H)
    ]
    return [numbers(head.keys(sim.worker.pages, n)[:, D:]) for head in heads]


OPTIONS = {"ratio": 8, "recent": 8, "sinks": 4, "window": 4, "interval": 4}


def test_a_prompt_larger_than_the_pool_is_read_within_its_peak(monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {**OPTIONS, "prefill_peak_tokens": 256}
    # 16 blocks of peak, and 8 for the copy; a prompt of 480 tokens has 30.
    sim = Simulation(26, options, max_num_batched_tokens=96)
    sim.add("long", prompt(1, 480), 24)
    most = 0
    while sim.scheduler.has_requests():
        sim.step()
        most = max(most, held(sim))
    assert len(sim.outputs["long"]) == 24
    assert sim.num_compressions >= 2 and sim.num_preemptions == 0
    assert most <= 24
    assert sim.pool.get_num_free_blocks() == 25


def test_without_a_peak_such_a_prompt_is_refused() -> None:
    sim = Simulation(26, OPTIONS, max_num_batched_tokens=96)
    with pytest.raises(ValueError, match=r"may take 32 blocks .* a request has 25"):
        sim.add("long", prompt(1, 480), 24)


def test_many_long_prompts_share_a_small_pool(monkeypatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    sim = Simulation(40, {**OPTIONS, "prefill_peak_tokens": 256}, max_num_batched_tokens=96)
    lengths = {f"r{i}": 150 + 37 * i % 330 for i in range(10)}
    for index, (name, length) in enumerate(lengths.items()):
        extra = {"kv_compress": False} if length < 200 else {}
        sim.add(name, prompt(index, length), 20, **extra)
    sim.run()
    assert all(len(sim.outputs[name]) == 20 for name in lengths)
    assert sim.pool.get_num_free_blocks() == 39


def test_the_context_is_compressed_before_the_question_is_read() -> None:
    sim = Simulation(80, OPTIONS, max_num_batched_tokens=200)
    sim.add("r", prompt(2, 350), 4, kv_compress_context_tokens=300)
    chunks, compressed = [], []
    while sim.scheduler.has_requests():
        output = sim.scheduler.schedule
        plans = []

        def schedule(*args, stock=output, plans=plans):
            plans.append(stock(*args))
            return plans[-1]

        sim.scheduler.schedule = schedule
        sim.step()
        sim.scheduler.schedule = output
        chunks += plans[0].num_scheduled_tokens.values()
        compressed += [(c.num_tokens, c.covered, len(c.new_blocks))
                       for c in plans[0].kv_compress.compressions]  # fmt: skip
    # 300 tokens are 18 full blocks, which others can take; the question adds too little to compress
    # once more.
    assert chunks[:3] == [200, 88, 62]
    assert compressed == [(288, 18, 3)]
    assert len(sim.outputs["r"]) == 4


def test_what_a_compression_observes_is_not_taken_from_the_prefix_cache() -> None:
    # Of a policy whose hits need not be whole segments.
    sim = Simulation(120, {**OPTIONS, "policy": "kv_compress"}, max_num_batched_tokens=512)
    tokens = prompt(3, 350)
    sim.add("first", tokens, 2)
    sim.run()
    sim.add("again", tokens, 2, kv_compress_context_tokens=160)
    sim.step()
    # The window of 4 before token 160 lies in block 9.
    assert sim.num_cached_tokens == 9 * B
    sim.run()
    assert len(sim.outputs["again"]) == 2


@pytest.mark.parametrize("seed", range(4))
def test_protected_positions_outlive_every_compression(monkeypatch, seed: int) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    torch.manual_seed(seed)
    source = random.Random(seed)
    ranges = [(3, 40), (101, 102), (290, 330), (395, 420)]
    sim = Simulation(120, {**OPTIONS, "interval": 1}, max_num_batched_tokens=128)
    extra = {} if seed % 2 else {"kv_compress_context_tokens": source.randrange(200, 300)}
    text = ",".join(f"{a}:{b}" for a, b in ranges)
    sim.add("kept", prompt(seed, 310), 160, kv_compress_protect=text, **extra)
    sim.add("other", prompt(seed + 50, 200), 160)
    compressions = 0
    while "kept" in sim.scheduler.requests:
        before = sim.num_compressions
        sim.step()
        if "kept" not in sim.scheduler.requests or sim.num_compressions == before:
            continue
        compressions += 1
        n = sim.scheduler.requests["kept"].num_computed_tokens
        wanted = {p for a, b in ranges for p in range(a, min(b, n))}
        for head in positions(sim, "kept"):
            assert wanted <= set(head.tolist())
            assert len(head) < n
    assert compressions > 8


def test_a_request_that_keeps_all_must_fit_where_prompts_are_bounded() -> None:
    config = KVCompressConfig(ratio=4, prefill_peak_tokens=1024)
    engine = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=8192, hf_text_config=SimpleNamespace(), is_hybrid=False
        ),
        cache_config=SimpleNamespace(block_size=16),
        num_speculative_tokens=0,
    )

    def check(config, engine, request):
        budget = check_request(config, request.sampling_params, resumable=False)
        check_length(config, engine, request, budget)

    def request(length: int, max_tokens: int, **extra_args):
        params = SimpleNamespace(max_tokens=max_tokens, extra_args=extra_args)
        return SimpleNamespace(sampling_params=params, prompt_token_ids=[1] * length)

    check(config, engine, request(8000, 100))
    check(config, engine, request(900, 100, kv_compress=False))
    with pytest.raises(ValueError, match=r"prompt of 8000 tokens .* 507 blocks .* has 267"):
        check(config, engine, request(8000, 100, kv_compress=False))
    with pytest.raises(ValueError, match="has 267"):
        check(config, engine, request(100, 8000, kv_compress_ratio=1))
    check(KVCompressConfig(), engine, request(8000, 100, kv_compress=False))

    # Embeddings are as long as they have rows.
    embeds = request(0, 100, kv_compress=False)
    embeds.prompt_token_ids, embeds.prompt_embeds = None, torch.zeros(8000, 4)
    with pytest.raises(ValueError, match=r"prompt of 8000 tokens .* 507 blocks .* has 267"):
        check(config, engine, embeds)

    # What the pool has counts, once it is known; of several engines only their sum is.
    engine.cache_config.num_gpu_blocks = 508
    engine.parallel_config = SimpleNamespace(data_parallel_size=1)
    check(config, engine, embeds)
    engine.cache_config.num_gpu_blocks = 507
    with pytest.raises(ValueError, match="has 506"):
        check(config, engine, embeds)
    engine.cache_config.num_gpu_blocks = 2 * 508
    engine.parallel_config.data_parallel_size = 2
    with pytest.raises(ValueError, match="has 267"):
        check(config, engine, embeds)


def test_what_was_observed_of_a_request_that_is_preempted_is_not_added_up() -> None:
    """A worker could not read its row: the state slot is released before."""
    sim = Simulation(80, {"policy": "h2o", "query_stride": 5, "ratio": 4, "window": 4,
                          "min_prompt_tokens": 40})  # fmt: skip
    sim.add("r", prompt(1, 400), 5, kv_compress_context_tokens=160)
    scheduler, request = sim.scheduler, sim.scheduler.requests["r"]
    while request.num_computed_tokens <= 200:
        sim.step()
    assert scheduler.kv_compress_planner.requests["r"].kept
    plan = scheduler._steps.begin({"r": request.num_computed_tokens})
    assert [item.old_kept > 0 for item in plan.accumulations] == [True]
    scheduler.kv_cache_manager.free(request)
    scheduler._steps.complete(plan, {}, {}, scheduler.requests, False)
    assert len(plan.released) == 1 and plan.accumulations == []
