# SPDX-License-Identifier: Apache-2.0
"""Rows of several tokens over packed pages of fewer bits, drafted by n-grams and by a draft model
whose layers share the pages; integrity is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams

from kvcompress_vllm import LLM
from tests.integration.engines import engine, greedy, samples, scheduler
from tests.integration.simulation import ngram
from tests.integration.test_drafts import speculating
from tests.integration.test_speculation import DRAFTS, counted


@pytest.fixture(scope="module", params=["fp8-ngram", "int4-ngram", "fp8-eagle", "int4-eagle3"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    page_dtype, method = request.param.split("-")
    config: dict[str, Any] = ngram(DRAFTS)
    if method != "ngram":
        config = speculating(tmp_path_factory.mktemp("head"), method)
    options = {"page_dtype": page_dtype, "ratio": 4, "interval": 2}
    with engine(
        options,
        dtype="bfloat16",
        max_num_batched_tokens=1024,
        enable_prefix_caching=True,
        disable_log_stats=False,
        speculative_config=config,
    ) as running:
        yield running


def test_needles_are_found(llm: LLM) -> None:
    asked = [s for task, n in (("single", 600), ("multikey", 800)) for s in samples(task, n, 3)]
    tokenizer = llm.get_tokenizer()
    for _ in range(2):  # the second time from the prefix cache
        replies = tokenizer.batch_decode(greedy(llm, [prompt for prompt, _ in asked], 16))
        right = [answer in reply for (_, answer), reply in zip(asked, replies, strict=True)]
        assert right == [True] * 6


def test_generations_are_packed_while_tokens_are_drafted(llm: LLM) -> None:
    before = counted(llm)
    prompts = [prompt for prompt, _ in samples("kv10", 300, 3)]
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    for output in llm.generate(prompts, params, use_tqdm=False):
        assert len(output.outputs[0].token_ids) == 400
        assert output.kv_compress.compressions >= 3
    assert counted(llm)["draft_tokens"] > before["draft_tokens"]
    manager = scheduler(llm).kv_compress_manager
    assert manager.packed == {}
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
