# SPDX-License-Identifier: Apache-2.0
"""The engine on a GPU: model runner V2, async scheduling, full CUDA graphs, FlashAttention."""

from __future__ import annotations

import gc

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.quality.cells import DECODED, Cell, Choice
from benchmarks.quality.measure import Settings, measure, start
from kvcompress_vllm.integration.worker.reports import reports_of
from kvcompress_vllm.records.report import Report, Scored
from tests.integration.engines import engine, greedy, samples, scheduler
from tests.integration.simulation import MODEL

pytestmark = pytest.mark.gpu

PAIRS = samples("single", 1500, 20, offset=2000)
PROMPTS = [prompt for prompt, _ in PAIRS]


def gpu_engine(options, **arguments):
    defaults = {"dtype": "bfloat16", "enforce_eager": False, "kv_cache_memory_bytes": 1 << 31,
                "gpu_memory_utilization": 0.05, "num_gpu_blocks_override": 2000}  # fmt: skip
    return engine(options, **{**defaults, **arguments})


def right(llm, outputs) -> int:
    """Outputs that start with the answer of their prompt."""
    texts = [llm.get_tokenizer().decode(ids, skip_special_tokens=True) for ids in outputs]
    pairs = zip(texts, PAIRS, strict=True)
    return sum(text.strip().startswith(answer) for text, (_, answer) in pairs)


def test_ratio_1_gives_the_tokens_of_stock_vllm() -> None:
    with gpu_engine(None) as llm:
        expected = greedy(llm, PROMPTS, 16)
        assert right(llm, expected) == 20
    with gpu_engine({"ratio": 1}) as llm:
        assert greedy(llm, PROMPTS, 16) == expected


def test_graphs_eager_and_synchronous_scheduling_give_the_same_answers() -> None:
    """Until the end of text: beyond it the text is arbitrary, and the kernels round differently."""
    outputs = []
    for eager, asynchronous in [(False, True), (False, False), (True, True)]:
        with gpu_engine({"ratio": 8}, enforce_eager=eager, async_scheduling=asynchronous) as llm:
            outputs.append(greedy(llm, PROMPTS, 16))
            assert right(llm, outputs[-1]) >= 18
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_life_cycle_with_preemption_and_decode_compression(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is checked: each block owned once, scheduler and worker agree."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {"ratio": 4, "interval": 2}
    arguments = {"num_gpu_blocks_override": 260, "max_num_seqs": 16}
    with gpu_engine(options, async_scheduling=asynchronous, **arguments) as llm:
        outputs = greedy(llm, PROMPTS, 300, ignore_eos=True)
        assert all(len(tokens) == 300 for tokens in outputs)
        assert right(llm, outputs) >= 18


def test_all_requests_are_packed_and_grow_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of whole blocks, prefilled together: the step after packs every row, and adds a block
    to each."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    most: list[int] = []
    with gpu_engine({"ratio": 4}, max_num_seqs=4, max_num_batched_tokens=8192) as llm:
        tokenizer = llm.get_tokenizer()
        ids = [tokenizer(prompt).input_ids for prompt in PROMPTS[:4]]
        prompts = [{"prompt_token_ids": [*some[:1], *some[1 + len(some) % 16 :]]} for some in ids]
        stock = scheduler(llm).schedule

        def schedule(*args, **kwargs):
            output = stock(*args, **kwargs)
            grown = sum(map(bool, output.scheduled_cached_reqs.new_block_ids))
            most.append(min(len(output.kv_compress.compressions), grown))
            return output

        scheduler(llm).schedule = schedule
        outputs = greedy(llm, prompts, 16)
        texts = [tokenizer.decode(some, skip_special_tokens=True) for some in outputs]
    assert max(most) == 4
    assert sum(t.strip().startswith(a) for t, (_, a) in zip(texts, PAIRS, strict=False)) >= 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_mass_budgets_and_reports(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves come back one or two steps later; every prompt keeps what it needs of its own."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    reports: list[Report | Scored] = []
    with gpu_engine({"mass": 0.99, "interval": 2}, async_scheduling=asynchronous) as llm:
        stock = scheduler(llm).update_from_output
        scheduler(llm).update_from_output = lambda step, output: (
            reports.extend(reports_of(output)) or stock(step, output)
        )
        outputs = greedy(llm, PROMPTS, 200, ignore_eos=True)
        assert right(llm, outputs) >= 18
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    curves = {(r.request_id, r.num_tokens): r.curve for r in reports if isinstance(r, Scored)}
    carried_out = [r for r in reports if isinstance(r, Report)]
    assert len(carried_out) > 20 and len(curves) >= len(carried_out)
    kept = set()
    for report in carried_out:
        blocks = sum(map(sum, report.kept_pages)) // 12
        first = curves[report.request_id, report.num_tokens]
        # The first curve need not have a point at this number of blocks, but has some around it.
        above = next(c for c in first.blocks if c >= blocks)
        below = max(c for c in first.blocks if c <= blocks)
        lost = report.curve.lost_at(blocks)
        assert first.lost_at(above) - 1e-6 <= lost <= first.lost_at(below) + 1e-6
        assert 0 < report.milliseconds < 1000
        kept.add(blocks)
    assert len(kept) > 3


def test_the_quality_benchmark_has_runner_v2_generate_what_it_gives() -> None:
    """Wrong tokens are an error of the benchmark itself."""
    choices = [Choice("kv_compress", "auto", ratio, DECODED) for ratio in (1.0, 4.0)]
    missing = {Cell(*choice, "single", 600): range(8) for choice in choices}
    arguments = {"gpu_memory_utilization": 0.3, "num_gpu_blocks_override": 2000}
    settings = Settings(str(MODEL), "recent=32", arguments)
    llm = start(settings, missing)
    try:
        kept_all, compressed = measure(llm, settings, missing)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    assert sum(kept_all["scores"]) == 8 and kept_all["compressions"] == 0
    assert compressed["compressions"] >= 2
