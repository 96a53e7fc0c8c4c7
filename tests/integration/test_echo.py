# SPDX-License-Identifier: Apache-2.0
"""The policy echo in an engine: what is kept depends on the prompt alone, however it was read."""

from __future__ import annotations

import random

import pytest
import torch
from vllm import SamplingParams

from tests.integration.engines import engine, scheduler

OPTIONS = {"policy": "echo", "policy_options": {"weight": 0, "value_norms": False}, "ratio": 4}


def prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 1000) for _ in range(length)]


PROMPTS = [prompt(i, n) for i, n in enumerate((700, 1500, 300, 1030))]


def read(llm, prompts, max_tokens=2, **extra):
    """Answers, and the keys that every head kept of each prompt's latest compression."""
    llm.collective_rpc("kv_compress_record")
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra or None
        ),
        use_tqdm=False,
    )
    (record,) = llm.collective_rpc("kv_compress_record")
    kept = {name.split("-")[0]: keys for name, keys in record.items()}
    return outputs, [kept.get(output.request_id.split("-")[0]) for output in outputs]


@pytest.fixture(scope="module")
def llm():
    with engine(OPTIONS, max_num_batched_tokens=4096, enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture(scope="module")
def cold(llm):
    return read(llm, PROMPTS)[1]


def test_hits_bring_their_scores(llm, cold) -> None:
    outputs, kept = read(llm, PROMPTS)
    assert [output.num_cached_tokens for output in outputs] == [512, 1280, 256, 768]
    assert kept == cold and all(kept)


def test_a_conversation_grows_by_whole_segments(llm, cold) -> None:
    longer = PROMPTS[0] + prompt(50, 200)
    (output,), kept = read(llm, [longer])
    assert output.num_cached_tokens == 512
    llm.reset_prefix_cache()
    (output,), again = read(llm, [longer])
    assert output.num_cached_tokens == 0 and again == kept


def test_what_is_decoded_does_not_depend_on_others(llm) -> None:
    alone = read(llm, [PROMPTS[2]], 300)
    many = read(llm, PROMPTS, 300)
    assert alone[0][0].outputs[0].token_ids == many[0][2].outputs[0].token_ids
    assert alone[1][0] == many[1][2]


def test_scores_are_those_of_the_op_on_the_whole_prompt(llm) -> None:
    """What an uncompressed prompt's blocks hold: positive but for the last token alone."""
    llm.reset_prefix_cache()
    read(llm, [prompt(70, 513)], 1, kv_compress=False)
    pool = scheduler(llm).kv_cache_manager.block_pool
    blocks = [b.block_id for b in pool.blocks if b.block_hash is not None]
    (worker,) = llm.collective_rpc(lambda worker: worker.kv_compress_context.state.echo)
    slots = worker.shape[0] // pool.num_gpu_blocks
    scores = worker.view(pool.num_gpu_blocks, slots, -1)[torch.tensor(blocks)]
    assert len(blocks) == 32 and bool(((scores > 0) & (scores <= 1)).all())


def test_chunks_do_not_matter(llm, cold) -> None:
    """Last, for the end of an engine takes what others share with it. Marks inside a prompt
    are the request's own."""
    marked = read(llm, [prompt(9, 900)], kv_compress_context_tokens=600)[1]
    with engine(OPTIONS, max_num_batched_tokens=300, max_num_seqs=4) as small:
        assert read(small, PROMPTS)[1] == cold
        assert read(small, [prompt(9, 900)], kv_compress_context_tokens=600)[1] == marked
