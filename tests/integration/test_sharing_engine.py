# SPDX-License-Identifier: Apache-2.0
"""Packed prefixes that requests share, in an engine: who takes one answers like who computes it."""

from __future__ import annotations

import random

import pytest
from vllm import SamplingParams

from tests.integration.engines import engine, samples, scheduler

BUDGET = {"ratio": 8, "policy": "echo", "allow_policies": True, "interval": 2}


def tokens(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 1000) for _ in range(length)]


@pytest.fixture(scope="module")
def llm():
    with engine(
        BUDGET, max_num_batched_tokens=1024, max_num_seqs=24, enable_prefix_caching=True
    ) as llm:
        yield llm


def answer(llm, prompts, max_tokens=40, **extra):
    """Token ids and what the usage says, by prompt."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra),
        use_tqdm=False,
    )
    return [list(o.outputs[0].token_ids) for o in outputs], [o.kv_compress for o in outputs]


def reply(llm, prompt, max_tokens=150, **extra):
    """As ``answer`` of one prompt, and the tokens that were not computed."""
    sampling = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids)], [output.kv_compress], [output.num_cached_tokens]


def contexts(llm):
    return list(scheduler(llm).kv_compress_planner.contexts)


@pytest.mark.parametrize("asked", [
    {},  # what is kept is told by the echo scores beside the cache, and these are shared, too
    {"kv_compress_policy": "diverse"},
    {"kv_compress_policy": "snapkv", "kv_compress_protect": "10:60,700:720"},
    {"kv_compress_policy": "kv_compress", "kv_compress_mass": 0.9},
], ids=lambda asked: "-".join(map(str, asked.values())))  # fmt: skip
def test_a_hit_answers_like_a_miss(llm, asked) -> None:
    """Also when it is packed again, and in any batch."""
    asked = {**asked, "kv_compress_context_tokens": 650}
    prompts = [tokens(1, 650) + tokens(10 + i, 40 + 30 * i) for i in range(4)]
    misses = []
    for prompt in prompts:
        assert llm.reset_prefix_cache()
        [ids], [usage] = answer(llm, [prompt], 160, **asked)
        assert (usage.shared_blocks, usage.context_tokens) == (0, 640)
        misses.append(ids)
    together, usage = answer(llm, prompts, 160, **asked)
    assert together == misses
    # The last to compute it is still held: nobody computed it again.
    (context,) = contexts(llm)
    assert [u.shared_blocks for u in usage] == [context.packing.kept] * 4
    assert context.hits == 4
    if "kv_compress_mass" not in asked:
        assert all(u.compressions >= 2 for u in usage)


def test_24_on_one_document_hold_it_once(llm) -> None:
    """Of 90 blocks, and of each 6 blocks of its own: stock vLLM holds 234."""
    prompts = [tokens(2, 1440) + tokens(100 + i, 50) for i in range(24)]
    sampling = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True,
        extra_args={"kv_compress_context_tokens": 1440},
    )  # fmt: skip
    pool = scheduler(llm).kv_cache_manager.block_pool
    for index, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
    most = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = max(most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    assert most <= 12 + 24 * 6
    assert contexts(llm)[-1].hits == 23


@pytest.fixture(scope="module")
def chats():
    """An engine whose answers are packed like prompts."""
    with engine(
        {**BUDGET, "context_stride": 256},
        max_num_batched_tokens=1024,
        max_num_seqs=24,
        enable_prefix_caching=True,
    ) as llm:
        yield llm


@pytest.mark.parametrize("policy", ["echo", "diverse", "snapkv"])
def test_a_turn_answers_like_one_that_computes_its_history(chats, policy) -> None:
    """Each answer passes a multiple of the stride, where it is packed; each turn goes on from what
    the one before has read and decoded."""
    asked = {"kv_compress_policy": policy}
    history, turns, end = tokens(3, 700), [], 0
    assert chats.reset_prefix_cache()
    for turn in range(3):
        [ids], [usage], [cached] = reply(chats, history, **asked)
        turns.append((history, ids))
        # The last token was not computed.
        assert cached == (end - 1 if turn else 0) // 16 * 16
        assert (usage.context_tokens, bool(usage.shared_blocks)) == (
            [512, 768, 1024][turn],
            bool(turn),
        )
        end = len(history) + len(ids)
        history = [*history, *ids, *tokens(40 + turn, 110)]
    assert [context.num_tokens for context in contexts(chats)] == [256, 512, 768, 1024, 1280]
    for prompt, ids in turns:
        assert chats.reset_prefix_cache()
        [again], [usage], [cached] = reply(chats, prompt, **asked)
        assert again == ids and not usage.shared_blocks and not cached


def test_a_message_that_passes_the_end_of_a_segment(chats, monkeypatch) -> None:
    """One step reads it, beside others; what is packed behind that goes by the scores of both
    segments."""
    asked, passed = {"kv_compress_context_stride": 1024}, []
    observers = scheduler(chats).kv_compress_planner.observers
    stock = observers.passes

    def passes(*args, **kwargs):
        passed.append(stock(*args, **kwargs))
        return passed[-1]

    monkeypatch.setattr(observers, "passes", passes)
    assert chats.reset_prefix_cache()
    histories = [tokens(60 + index, 300 + index) for index in range(3)]
    said, _ = answer(chats, histories, 40, **asked)
    prompts = [
        [*history, *ids, *tokens(70 + index, (250, 480, 172)[index])]
        for index, (history, ids) in enumerate(zip(histories, said, strict=True))
    ]
    found, usages = answer(chats, prompts, 560, **asked)
    assert passed[0] and len(passed) == 3  # there are few slots here
    assert all(usage.compressions == 1 for usage in usages)
    for prompt, ids in zip(prompts, found, strict=True):
        assert chats.reset_prefix_cache()
        [again], _, [cached] = reply(chats, prompt, 560, **asked)
        assert again == ids and not cached


def test_turns_of_int4_go_on_in_segments_beside_others(monkeypatch) -> None:
    """Others have the same history meanwhile, and are judged by other things."""
    options = {**BUDGET, "ratio": 4, "page_dtype": "int4", "context_stride": 512}
    asked = [{"kv_compress_policy": "snapkv"}, {"kv_compress_mass": 0.9}, {}]
    ((prompt, answer),) = samples("single", 560, 1)
    with engine(
        options, dtype="bfloat16", max_num_batched_tokens=1024, enable_prefix_caching=True
    ) as llm:
        unfinished, loaded = scheduler(llm)._unfinished, []
        stock = unfinished.take_loaded
        monkeypatch.setattr(unfinished, "take_loaded", lambda: [*map(keep(loaded), stock())])
        tokenizer = llm.get_tokenizer()
        history, question = tokenizer.encode(prompt), "\n" + prompt.rpartition("\n")[2]
        end = 0
        for turn in range(4):
            [ids], [usage], [cached] = reply(llm, history, 30)
            assert cached == (end - 1 if turn else 0) // 16 * 16
            assert answer in tokenizer.decode(ids), turn
            if turn < len(asked):
                other = [*history, *tokens(turn, 20)]
                ([said], _, _) = reply(llm, other, 20, **asked[turn])
                assert len(said) == 20
            end = len(history) + len(ids)
            history = [*history, *ids, *tokenizer.encode(question, add_special_tokens=False)]
        assert usage.compressions == 0 and usage.shared_blocks
        assert len(loaded) >= 3


def keep(found: list):
    """A function that gives back what it notes."""

    def note(item):
        found.append(item)
        return item

    return note
