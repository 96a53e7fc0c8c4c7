# SPDX-License-Identifier: Apache-2.0
"""The real engine on the bundled model: exact where nothing is dropped, else reproducible."""

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from benchmarks.masking_study import Llama, Setting, kept_keys
from tests.integration.engines import engine, greedy, samples, scheduler, transformers_greedy
from tests.integration.simulation import MODEL

PROMPTS = tuple(
    prompt
    for task, length in [("single", 128), ("multikey", 400), ("kv40", 900), ("qa", 500),
                         ("vt2", 300), ("copy", 700), ("single", 1200), ("multivalue", 600)]
    for prompt, _ in samples(task, length, 1)
)  # fmt: skip


@pytest.mark.parametrize("options", [None, {"ratio": 1}], ids=["off", "ratio 1"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_tokens_equal_transformers(options: dict | None, dtype: str) -> None:
    expected = transformers_greedy(PROMPTS, getattr(torch, dtype), 20)
    with engine(options, dtype=dtype, max_num_batched_tokens=128) as llm:
        assert greedy(llm, list(PROMPTS), 20) == expected  # one batch, chunked prefill
        assert greedy(llm, [PROMPTS[2]], 20) == [expected[2]]  # prefix cache hit, alone
        twice = greedy(llm, [PROMPTS[0]], 20, n=2, temperature=1, top_k=1)
        assert twice == [expected[0]] * 2


def test_negative_token_ids_are_refused() -> None:
    """vLLM 0.26 looks at the largest alone; a negative one ends the engine, or is read from the
    end. Later ones refuse it in words of their own."""
    with engine({"ratio": 4}) as llm:
        for ids in ([-1], [1500] * 200 + [-5000] + [1500] * 200):
            refused = rf"oken id {min(ids)} (.* integer >= 0|is out of vocabulary)"
            with pytest.raises((ValueError, VLLMValidationError), match=refused):
                llm.generate({"prompt_token_ids": ids}, use_tqdm=False)
        assert len(greedy(llm, [PROMPTS[0]], 2)[0]) == 2


def kept(llm, prompt: str) -> list[list[int]]:
    """Which keys every head keeps when the prompt is compressed."""
    llm.collective_rpc("kv_compress_record")
    greedy(llm, [prompt], 3)
    (record,) = llm.collective_rpc("kv_compress_record")
    (heads,) = record.values()
    return heads


def test_kept_keys_do_not_depend_on_chunks_batches_or_prefix_hits() -> None:
    (prompt, _), (other, _) = samples("multikey", 1000, 1) + samples("kv40", 700, 1)
    # Echo's are the same where steps have room for its segments: tests/integration/test_echo.py.
    options = {"policy": "kv_compress", "ratio": 8}
    with engine(options, max_num_batched_tokens=2048) as llm:
        prefill = scheduler(llm).scheduler_config
        once = kept(llm, prompt)
        assert len(once) == 12 and sum(map(len, once)) == 8 * 12 * 16
        assert kept(llm, prompt) == once, "prefix cache hit"
        for chunk in (1000, 512, 100, 37, 7):
            assert llm.reset_prefix_cache()
            prefill.long_prefill_token_threshold = chunk
            assert kept(llm, prompt) == once, f"chunks of {chunk}"
        assert llm.reset_prefix_cache()
        llm.collective_rpc("kv_compress_record")
        greedy(llm, [other, prompt, other[:-40] + other[-30:]], 3)
        (record,) = llm.collective_rpc("kv_compress_record")
        assert once in record.values(), "in a batch"
    with engine(options, max_num_batched_tokens=2048) as llm:
        assert kept(llm, prompt) == once, "another engine"


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
def test_kept_keys_equal_a_literal_implementation(allocator: str) -> None:
    """benchmarks/masking_study.py knows nothing of pages, blocks, vLLM or our ops."""
    model = Llama(MODEL)
    # The engine's floor holds all shields wherever the prompt ends: 4 + 16 tokens are two pages.
    setting = Setting(ratio=6, allocator=allocator, min_tokens=32)
    with engine({"policy": "kv_compress", "ratio": 6, "allocator": allocator}) as llm:
        for task, length in [("single", 1200), ("kv40", 800)]:
            ((prompt, _),) = samples(task, length, 1)
            heads = kept(llm, prompt)
            ids = llm.get_tokenizer().encode(prompt)
            mask = kept_keys(model.prefill(ids), setting)
            covered = len(ids) // 16 * 16
            expected = [
                row.nonzero().flatten().tolist() for row in mask[..., :covered].flatten(0, 1)
            ]
            assert heads == expected


def peak_running(llm, prompts: list[str], max_tokens: int) -> tuple[int, list[list[int]]]:
    """Most requests that ran at once, and the outputs."""
    running: list[int] = []
    stock = scheduler(llm).schedule

    def schedule(*args):
        output = stock(*args)
        running.append(len(output.num_scheduled_tokens))
        return output

    scheduler(llm).schedule = schedule
    outputs = greedy(llm, prompts, max_tokens, ignore_eos=True)
    return max(running), outputs


def test_more_requests_at_once_than_stock_in_the_same_memory() -> None:
    long = [prompt for prompt, _ in samples("single", 1000, 12)]
    short = [prompt for prompt, _ in samples("single", 120, 4)]
    memory = {"num_gpu_blocks_override": 140, "max_num_seqs": 16}
    results = {}
    for name, options in [("stock", None), ("ratio 8", {"ratio": 8})]:
        with engine(options, **memory) as llm:
            results[name] = peak_running(llm, long + short, 40)
            pool = scheduler(llm).kv_cache_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    (stock_running, stock), (running, outputs) = results["stock"], results["ratio 8"]
    assert running > stock_running
    assert all(len(tokens) == 40 for tokens in outputs)
    assert outputs[12:] == stock[12:], "too short to compress: identical"


def test_answers_survive_preemption() -> None:
    pairs = samples("single", 600, 10)
    with engine({"ratio": 4}, num_gpu_blocks_override=130, max_num_seqs=10) as llm:
        answers = greedy(llm, [prompt for prompt, _ in pairs], 90, ignore_eos=True)
        assert all(len(tokens) == 90 for tokens in answers)
        texts = [llm.get_tokenizer().decode(tokens) for tokens in answers]
        right = sum(t.startswith(a) for t, (_, a) in zip(texts, pairs, strict=True))
        assert right >= 9
