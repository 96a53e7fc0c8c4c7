# SPDX-License-Identifier: Apache-2.0
"""vLLM's features beside compression: at ratio 1 as without the flag, at ratio 8 still themselves.

Two engines: stock vLLM, and one at ratio 1 where requests ask for 8. The integrity of the pool is
checked on every step.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import (
    BeamSearchParams,
    RequestOutputKind,
    StructuredOutputsParams,
)

from kvcompress_vllm import LLM
from kvcompress_vllm.records.packing import Packing
from tests.integration.engines import engine, samples, scheduler

PAIRS = samples("single", 700, 3, offset=3000)
PROMPTS = [prompt for prompt, _ in PAIRS]
ANSWERS = [answer for _, answer in PAIRS]
ARGUMENTS = {
    "scheduling_policy": "priority",
    "max_num_batched_tokens": 256,
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
SCHEMA = {
    "type": "object",
    "properties": {"found": {"type": "boolean"}, "digits": {"type": "string", "maxLength": 4}},
    "required": ["found", "digits"],
    "additionalProperties": False,
}
Wishes = dict[str, Any] | None
AT_8 = {"kv_compress_ratio": 8}


def generate(llm: LLM, wishes: Wishes, prompts: list[str] = PROMPTS, **params: Any) -> Any:
    """Completed requests; greedy and 20 tokens unless the parameters say otherwise."""
    arguments = {name: params.pop(name) for name in ("lora_request", "priority") if name in params}
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 20, **params}, extra_args=wishes)
    return llm.generate(prompts, sampling, use_tqdm=False, **arguments)


def tokens(outputs: Any) -> list[list[int]]:
    return [list(choice.token_ids) for output in outputs for choice in output.outputs]


def texts(outputs: Any) -> list[str]:
    return [choice.text.strip() for output in outputs for choice in output.outputs]


def logprobs(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, logprobs=3)
    found = [choice.logprobs for output in outputs for choice in output.outputs]
    assert all(len(steps) == len(ids) for steps, ids in zip(found, tokens(outputs), strict=True))
    answer = len(llm.get_tokenizer().encode(ANSWERS[0], add_special_tokens=False))
    for output in outputs:
        (choice,) = output.outputs
        for token, step in zip(choice.token_ids[:answer], choice.logprobs, strict=False):
            assert step[token].logprob > -1 and step[token].rank == 1
    return tokens(outputs), [
        [round(step[token].logprob, 3) for token, step in zip(ids, steps, strict=True)]
        for ids, steps in zip(tokens(outputs), found, strict=True)
    ]


def prompt_logprobs(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, prompt_logprobs=1)
    assert all(text == answer for text, answer in zip(texts(outputs), ANSWERS, strict=True))
    # Of the prompt, before anything is compressed: the same at any ratio.
    assert all(len(o.prompt_logprobs) == len(o.prompt_token_ids) for o in outputs)
    return [
        [round(step[token].logprob, 3) for token, step in zip(ids[1:], steps[1:], strict=True)]
        for ids, steps in ((o.prompt_token_ids, o.prompt_logprobs) for o in outputs)
    ]


def several_choices(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, n=3, temperature=0.5, seed=5)
    right = [text.startswith(answer) for output, answer in zip(outputs, ANSWERS, strict=True)
             for text in texts([output])]  # fmt: skip
    assert len(right) == 9 and sum(right) >= 8
    return tokens(outputs)


def beam_search(llm: LLM, wishes: Wishes) -> Any:
    """vLLM makes a request of one token of every step of every beam, and takes no xargs."""
    outputs = llm.beam_search(
        [{"prompt": prompt} for prompt in PROMPTS[:2]], BeamSearchParams(beam_width=3, max_tokens=8)
    )
    best = [output.sequences[0] for output in outputs]
    assert all(answer in b.text for b, answer in zip(best, ANSWERS, strict=False))
    return [(s.tokens, round(s.cum_logprob, 3)) for output in outputs for s in output.sequences]


def stop_strings(llm: LLM, wishes: Wishes) -> Any:
    outputs = []
    for prompt, answer in PAIRS:
        outputs += generate(llm, wishes, [prompt], stop=[answer[-1]])
        assert texts(outputs)[-1] == answer[: answer.index(answer[-1])]
    return tokens(outputs)


def least_tokens(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, min_tokens=18, max_tokens=30)
    assert all(18 <= len(ids) <= 30 for ids in tokens(outputs))
    assert all(text.startswith(a) for text, a in zip(texts(outputs), ANSWERS, strict=True))
    return tokens(outputs)


def penalties(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, presence_penalty=1, frequency_penalty=1, ignore_eos=True)
    assert all(len(ids) == 20 for ids in tokens(outputs))
    return tokens(outputs)


def forbidden_words(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, bad_words=[ANSWERS[0]], logit_bias={5: -100})
    assert ANSWERS[0] not in texts(outputs)[0]
    return tokens(outputs)


def choice(llm: LLM, wishes: Wishes) -> Any:
    outputs = []
    for prompt, answer in PAIRS:
        wrong = answer[::-1] + answer[0]
        structured = StructuredOutputsParams(choice=[wrong, answer])
        outputs += generate(llm, wishes, [prompt], structured_outputs=structured)
    assert texts(outputs) == ANSWERS
    return tokens(outputs)


def regex(llm: LLM, wishes: Wishes) -> Any:
    structured = StructuredOutputsParams(regex=r"[a-f]{3}-[0-9]{4}")
    outputs = generate(llm, wishes, structured_outputs=structured)
    assert all(re.fullmatch(r"[a-f]{3}-[0-9]{4}", text) for text in texts(outputs))
    return tokens(outputs)


def json_schema(llm: LLM, wishes: Wishes) -> Any:
    structured = StructuredOutputsParams(json=SCHEMA)
    outputs = generate(llm, wishes, structured_outputs=structured, max_tokens=60)
    for text in texts(outputs):
        assert json.loads(text).keys() == {"found", "digits"}
    return tokens(outputs)


def priorities(llm: LLM, wishes: Wishes) -> Any:
    outputs = generate(llm, wishes, priority=[3, 1, 2])
    assert texts(outputs) == ANSWERS
    return tokens(outputs)


FEATURES: dict[str, Callable[[LLM, Wishes], Any]] = {
    function.__name__: function
    for function in (
        logprobs, prompt_logprobs, several_choices, beam_search, stop_strings, least_tokens,
        penalties, forbidden_words, choice, regex, json_schema, priorities,
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    """What vLLM gives without the flag."""
    with engine(None, **ARGUMENTS) as llm:
        return {name: feature(llm, None) for name, feature in FEATURES.items()}


@pytest.fixture(scope="module")
def compressing(stock: dict[str, Any]) -> Iterator[LLM]:
    # After `stock`: there is one engine in a process at a time.
    # What these answers at ratio 8 were chosen with; the bundled model is small.
    with engine({"policy": "diverse", "ratio": 1}, **ARGUMENTS) as llm:
        yield llm


@pytest.fixture
def compressed(compressing: LLM) -> Iterator[list[float]]:
    """The kept ratio of every compression of a test; all blocks are back after it."""
    kept: list[float] = []
    manager = scheduler(compressing).kv_compress_manager
    original = manager.pack

    def pack(request_id: str, packing: Packing) -> Any:
        kept.append(packing.kept / packing.covered)
        return original(request_id, packing)

    manager.pack = pack
    yield kept
    manager.pack = original
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not manager.packed and not scheduler(compressing).requests


@pytest.mark.parametrize("name", FEATURES)
def test_ratio_1_is_stock_vllm(
    name: str, stock: dict[str, Any], compressing: LLM, compressed: list[float]
) -> None:
    assert FEATURES[name](compressing, None) == stock[name]
    assert compressed == []


@pytest.mark.parametrize("name", FEATURES)
def test_ratio_8(
    name: str, stock: dict[str, Any], compressing: LLM, compressed: list[float]
) -> None:
    results = FEATURES[name](compressing, AT_8)
    if name == "beam_search":
        assert results == stock[name] and compressed == []
        return
    assert len(compressed) >= 3 and max(compressed) < 0.2
    if name == "prompt_logprobs":
        assert results == stock[name]


def test_a_seed_gives_the_same_tokens_however_the_prompt_is_chunked(compressing: LLM) -> None:
    """In three chunks, then in one after a prefix cache hit."""
    prompts = [prompt for prompt, _ in samples("copy", 700, 1, offset=3050)]
    sampled = [
        tokens(generate(compressing, None, prompts, seed=3, temperature=2, ignore_eos=True))
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


def stream(llm: LLM, count: int, **params: Any) -> Iterator[dict[str, list[int]]]:
    """Submit ``count`` requests at ratio 8; after every step, the tokens of each so far."""
    sampling = SamplingParams(
        temperature=0, ignore_eos=True, output_kind=RequestOutputKind.DELTA, extra_args=AT_8,
        **params,
    )  # fmt: skip
    received: dict[str, list[int]] = {}
    for index in range(count):
        received[f"stream-{index}"] = []
        llm.llm_engine.add_request(f"stream-{index}", PROMPTS[index], sampling)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            received[output.request_id] += output.outputs[0].token_ids
        yield received


def test_streaming_and_abort(compressing: LLM, compressed: list[float]) -> None:
    whole = tokens(generate(compressing, AT_8, max_tokens=60, ignore_eos=True))
    aborted = False
    for received in stream(compressing, 3, max_tokens=60):
        if not aborted and len(received["stream-1"]) > 10:
            compressing.llm_engine.abort_request(["stream-1"])
            aborted = True
    assert aborted and len(received["stream-1"]) < 60
    assert received["stream-0"] == whole[0] and received["stream-2"] == whole[2]
    assert len(compressed) == 6


def test_running_requests_start_again(compressing: LLM, compressed: list[float]) -> None:
    """``reset_prefix_cache(reset_running_requests=True)`` preempts everybody."""
    done = False
    for received in stream(compressing, 3, max_tokens=60):
        if not done and min(map(len, received.values())) > 10:
            assert compressing.reset_prefix_cache(reset_running_requests=True)
            done = True
    assert done and all(len(ids) == 60 for ids in received.values())
    decode = compressing.get_tokenizer().decode
    assert all(
        decode(received[f"stream-{i}"]).strip().startswith(answer)
        for i, answer in enumerate(ANSWERS)
    )
    assert len(compressed) == 6


def test_pause_and_resume(compressing: LLM, compressed: list[float]) -> None:
    """``keep`` freezes the requests where they are; nothing is lost."""
    whole = tokens(generate(compressing, AT_8, max_tokens=40, ignore_eos=True))
    core = compressing.llm_engine.engine_core.engine_core
    steps = 0
    for received in stream(compressing, 3, max_tokens=40):
        if min(map(len, received.values())) < 10 or steps > 5:
            continue
        if steps == 0:
            frozen = {name: list(ids) for name, ids in received.items()}
            core.pause_scheduler("keep", clear_cache=False)
        steps += 1
        assert received == frozen
        if steps == 5:
            core.resume_scheduler()
            steps += 1
    assert [received[f"stream-{i}"] for i in range(3)] == whole


def test_no_process_compiles_a_cuda_launcher_in_the_background(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without libcuda it never links, so every start would try again."""
    monkeypatch.delenv("HUMMING_DISABLE_PARALLEL_BUILD", raising=False)
    current_platform.import_kernels()
    assert os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] == "1"
