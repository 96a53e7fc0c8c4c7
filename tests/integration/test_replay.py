# SPDX-License-Identifier: Apache-2.0
"""Contexts that are repeated (``exact=kvzip``), in an engine: scores are those of a literal
repetition by another implementation, and requests share them like any context."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams

from benchmarks.real import scores
from benchmarks.real.model import Model
from kvcompress_vllm.ops.reference.rows import State
from kvcompress_vllm.scheduling import replay
from tests.integration.engines import engine, scheduler
from tests.integration.simulation import MODEL
from tests.integration.test_sharing_engine import answer, contexts, tokens

OPTIONS = {"ratio": 4, "policy": "echo", "allow_policies": True, "recent": 16}
N = 640


@pytest.fixture(scope="module")
def llm():
    patch = pytest.MonkeyPatch()
    patch.setattr(replay, "PART", 256)  # three parts, the last shorter
    with engine(
        OPTIONS, max_num_batched_tokens=160, max_num_seqs=4, enable_prefix_caching=True
    ) as llm:
        yield llm
    patch.undo()


def literal(context: list[int]) -> torch.Tensor:
    """``[L, H, N]`` by the study's own model and formula."""
    model = Model(MODEL, "cpu", torch.float32)
    read = model.prefill(torch.tensor([context]))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    repeat = tokenizer.encode(replay.REPEAT, add_special_tokens=False)
    best = torch.zeros(model.num_layers, model.heads, len(context))
    for begin in range(0, len(context), 256):
        part = torch.tensor([[*repeat, *context[begin : begin + 256]]])
        _, found = model.follow(
            read.keys, read.values, None, part[:, None], len(context), cache=True
        )
        for layer in range(model.num_layers):
            score = scores.replay(
                read.keys[0, layer], found[2][0, layer], found[0][0, layer], model.scale
            )
            best[layer] = torch.maximum(best[layer], score)
    return best


def test_scores_and_kept_keys_are_those_of_a_literal_repetition(llm) -> None:
    assert llm.reset_prefix_cache()
    context = tokens(1, N)
    llm.collective_rpc("kv_compress_record")
    answer(llm, [context + tokens(2, 30)], 2,
           kv_compress_context_tokens=N, kv_compress_exact="kvzip")  # fmt: skip
    ((kept,),) = (found.values() for found in llm.collective_rpc("kv_compress_record", args=(0,)))
    check_kept(llm, literal(context).flatten(0, 1), kept)


def check_kept(llm, wanted, kept) -> None:
    """The one context that is held has the scores that are wanted, ``[L * H, n]``."""
    (held,) = contexts(llm)
    n = held.num_tokens
    (state,) = llm.collective_rpc(lambda worker: worker.kv_compress_context.state)
    row = torch.tensor([*held.blocks, *[0] * (n // 16 - len(held.blocks))])
    heads = state.group.heads
    for head, positions in enumerate(kept):
        of_head = State(*state.tables).head(row, held.slot, *divmod(head, heads))
        stored = state.echo[of_head.place(torch.arange(len(positions)), 16)]
        torch.testing.assert_close(stored, wanted[head, positions], atol=1e-5, rtol=1e-3)
        # No key is dropped that the repetition attends to more.
        dropped = torch.ones(n, dtype=torch.bool)
        dropped[positions] = False
        chosen = [p for p in positions if 4 <= p < n - 16]
        if chosen and dropped.any():
            assert wanted[head, chosen].min() >= wanted[head, dropped].max() - 1e-5


@pytest.mark.parametrize("asked", [{}, {"kv_compress_mass": 0.9}], ids=["ratio", "mass"])
def test_a_hit_answers_like_a_miss_and_nobody_repeats_it_again(llm, asked) -> None:
    asked = {
        **asked,
        "kv_compress_policy": "echo",
        "kv_compress_context_tokens": N,
        "kv_compress_exact": "kvzip",
    }
    prompts = [tokens(1, N) + tokens(10 + i, 40 + 30 * i) for i in range(3)]
    misses = []
    for prompt in prompts:
        assert llm.reset_prefix_cache()
        [ids], [usage] = answer(llm, [prompt], 40, **asked)
        assert (usage.shared_blocks, usage.context_tokens) == (0, N)
        misses.append(ids)
    together, usage = answer(llm, prompts, 40, **asked)
    assert together == misses and all(u.shared_blocks for u in usage)
    # What was foreseen of a repetition is another context.
    answer(llm, prompts[:1], 2, **{**asked, "kv_compress_exact": "off"})
    assert len(contexts(llm)) == 2


def test_others_find_no_score_of_it_and_go_on_meanwhile(llm) -> None:
    """Echo scores in the prefix cache are those that were foreseen."""
    prompt = tokens(3, N + 64)
    assert llm.reset_prefix_cache()
    [alone], _ = answer(llm, [prompt], 24)
    assert llm.reset_prefix_cache()
    sampling = {"temperature": 0, "ignore_eos": True}
    llm.llm_engine.add_request("other", {"prompt_token_ids": tokens(4, 20)},
                               SamplingParams(max_tokens=30, **sampling))  # fmt: skip
    llm.llm_engine.add_request("exact", {"prompt_token_ids": prompt}, SamplingParams(
        max_tokens=4, extra_args={"kv_compress_context_tokens": N, "kv_compress_exact": "kvzip"},
        **sampling))  # fmt: skip
    done, steps = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                done[output.request_id] = steps
        steps += 1
    assert done.keys() == {"other", "exact"} and done["other"] <= 32
    assert steps >= (2 * N + 3 * 20) // 160
    [after], _ = answer(llm, [prompt], 24)
    assert after == alone
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize(("asked", "words"), [
    ({"kv_compress_exact": "kvzip"}, "needs kv_compress_context_tokens"),
    ({"kv_compress_exact": "twice", "kv_compress_context_tokens": N}, "one of off, kvzip"),
    ({"kv_compress_exact": "kvzip", "kv_compress_context_tokens": N,
      "kv_compress_policy": "snapkv"}, "reads echo scores"),
    ({"kv_compress_exact": "kvzip", "kv_compress_context_tokens": 1800}, "at most 1726"),
], ids=["no context", "value", "policy", "room"])  # fmt: skip
def test_what_cannot_be_repeated_is_refused(llm, asked, words) -> None:
    with pytest.raises(ValueError, match=words):
        answer(llm, [tokens(1, 1900)], 2, **asked)
