# SPDX-License-Identifier: Apache-2.0
"""Compression before the end of a prompt, through the real engine."""

from __future__ import annotations

import pytest

from tests.integration.engines import engine, greedy, samples, scheduler
from tests.integration.hidden import answered

PAIRS = samples("single", 1000, 6, offset=3000)


def test_questions_after_the_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {"ratio": 8, "allow_policies": True, "window": 64, "query_stride": 8}
    with engine(options) as llm:
        # Attention does not know what will be asked; keys unlike the others are a fair guess.
        assert answered(llm, PAIRS, kv_compress_policy="kv_compress") <= 2
        assert answered(llm, PAIRS) >= 5
        assert answered(llm, PAIRS, kv_compress_policy="keydiff", kv_compress_ratio=3) >= 4
        assert answered(llm, PAIRS, protect=True) >= 5
        # A policy that judges by all queries, chunk by chunk.
        assert answered(llm, PAIRS, protect=True, kv_compress_policy="h2o") >= 4
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_prompts_larger_than_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of 768 tokens reads prompts of 1,000."""
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {"ratio": 8, "prefill_peak_tokens": 512}
    prompts = [prompt for prompt, _ in PAIRS]
    with engine(options, num_gpu_blocks_override=60, max_num_batched_tokens=256) as llm:
        outputs = greedy(llm, prompts, 12)
        assert all(len(tokens) == 12 or tokens[-1] == 2 for tokens in outputs)
        assert llm.llm_engine.vllm_config.model_config.max_model_len == 2048
        pool = scheduler(llm).kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == 59
