# SPDX-License-Identifier: Apache-2.0
"""n-gram speculation on the real engine: the same answers with it and without."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.integration.engines import engine, greedy, samples, scheduler
from tests.integration.simulation import ngram

OPTIONS = {"ratio": 4, "interval": 2, "recent": 16}
PROMPTS = [
    prompt
    for task, length in [("single", 150), ("kv40", 500), ("copy", 700), ("multikey", 330),
                         ("qa", 90)]
    for prompt, _ in samples(task, length, 1)
]  # fmt: skip
LENGTH = 100
DRAFTS = 4
MEMORY = 512 << 20
"""Enough for an observation slot for everybody: who has none depends on who is done when."""


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    with engine(OPTIONS, kv_cache_memory_bytes=MEMORY) as llm:
        return greedy(llm, PROMPTS, LENGTH, ignore_eos=True)


@pytest.fixture(scope="module")
def speculative(expected: list[list[int]]) -> Iterator[Any]:
    with engine(
        OPTIONS,
        kv_cache_memory_bytes=MEMORY,
        speculative_config=ngram(DRAFTS),
        disable_log_stats=False,
    ) as llm:
        yield llm


def counted(llm: Any) -> dict[str, float]:
    names = "drafts", "draft_tokens", "accepted_tokens"
    found = {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    return {name: found[f"vllm:spec_decode_num_{name}"] for name in names}


def propose(llm: Any, draft: Callable[[list[int]], list[int]]) -> None:
    """Replace what is drafted behind the tokens of a request."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner

    signature = inspect.signature(type(runner.drafter).propose)

    def drafts(*args: Any, **kwargs: Any) -> list[list[int]]:
        given = signature.bind(None, *args, **kwargs).arguments
        lengths, token_ids = given["num_tokens_no_spec"], given["token_ids_cpu"]
        return [
            draft(token_ids[row, : lengths[row]].tolist()) if new else []
            for row, new in enumerate(given["sampled_token_ids"])
        ]

    runner.drafter.propose = drafts


def test_answers_are_the_same(speculative: Any, expected: list[list[int]]) -> None:
    assert greedy(speculative, PROMPTS, LENGTH, ignore_eos=True) == expected
    assert greedy(speculative, PROMPTS[:1], LENGTH, ignore_eos=True) == expected[:1]  # prefix hit
    first = counted(speculative)
    assert 0 < first["accepted_tokens"] < first["draft_tokens"]


def test_others_than_greedy_requests(speculative: Any) -> None:
    """Sampled ones, and one whose drafts a grammar may forbid."""
    grammar = StructuredOutputsParams(choice=["red", "green"])
    params = [
        SamplingParams(temperature=1, seed=7, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=20, structured_outputs=grammar),
    ]
    outputs = speculative.generate(PROMPTS[:2], params, use_tqdm=False)
    assert len(outputs[0].outputs[0].token_ids) == 60
    assert outputs[1].outputs[0].text in ("red", "green")
    assert not scheduler(speculative).kv_compress_planner.requests


@pytest.mark.parametrize("right", [True, False])
def test_all_or_nothing_is_accepted(
    speculative: Any, expected: list[list[int]], right: bool
) -> None:
    """At every border: where a compression is due, where a block and the window begin."""
    tokenizer = speculative.get_tokenizer()
    texts = [tokenizer.encode(p) + e for p, e in zip(PROMPTS, expected, strict=True)]

    def draft(tokens: list[int]) -> list[int]:
        # The worker's tokens may go beyond the last that is wanted.
        (text,) = (t for t in texts if t[: len(tokens)] == tokens[: len(t)])
        found = text[len(tokens) : len(tokens) + DRAFTS]
        return found if right else [(token + 1) % 1000 for token in found]

    propose(speculative, draft)
    before = counted(speculative)
    assert greedy(speculative, PROMPTS, LENGTH, ignore_eos=True) == expected
    more = {name: value - before[name] for name, value in counted(speculative).items()}
    assert more["drafts"] > 100
    if right:
        assert more["accepted_tokens"] > 0.95 * more["draft_tokens"]
    else:
        assert more["accepted_tokens"] == 0
