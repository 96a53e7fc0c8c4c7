# SPDX-License-Identifier: Apache-2.0
"""Speculation beside what else changes what is packed, and when: contexts at a stride, and contexts
that are repeated. The same answers with it and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from kvcompress_vllm.reporting.usage import CompressionUsage
from tests.integration.engines import engine, scheduler
from tests.integration.simulation import ngram
from tests.integration.test_drafts import say_drafts, speculating, worker
from tests.integration.test_sharing_engine import answer, contexts, reply, tokens
from tests.integration.test_speculation import DRAFTS, MEMORY, counted

OPTIONS = {"ratio": 8, "interval": 2, "recent": 16, "allow_policies": True}
STRIDE = {**OPTIONS, "context_stride": 256}
POLICIES = ("echo", "snapkv")
N = 640


class Turn(NamedTuple):
    history: list[int]
    answer: list[int]
    usage: CompressionUsage


def conversation(llm: Any, **asked: Any) -> list[Turn]:
    """Two turns, whose answers pass a multiple of the stride each."""
    assert llm.reset_prefix_cache()
    history, turns = tokens(3, 200), []
    for turn in range(2):
        [ids], [usage], _ = reply(llm, history, 90, **asked)
        turns.append(Turn(history, ids, usage))
        history = [*history, *ids, *tokens(40 + turn, 180)]
    return turns


def repeated(llm: Any) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Three questions about a context that is repeated, together: their answers, and by head the
    keys that each keeps."""
    assert llm.reset_prefix_cache()
    worker(llm).kv_compress_record()
    prompts = [tokens(1, N) + tokens(10 + i, 40 + 30 * i) for i in range(3)]
    asked = {"kv_compress_context_tokens": N, "kv_compress_exact": "kvzip"}
    answers, usage = answer(llm, prompts, 40, kv_compress_policy="echo", **asked)
    assert sorted(bool(u.shared_blocks) for u in usage) == [False, True, True]
    kept = worker(llm).kv_compress_record(on=False)
    return answers, list(kept.values())


def started(options: dict[str, Any], **arguments: Any) -> Any:
    return engine(
        options,
        kv_cache_memory_bytes=MEMORY,
        max_num_batched_tokens=1024,
        enable_prefix_caching=True,
        disable_log_stats=False,
        **arguments,
    )


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    with started(STRIDE) as llm:
        found = {policy: conversation(llm, kv_compress_policy=policy) for policy in POLICIES}
        return {**found, "repeated": repeated(llm)}


@pytest.fixture(scope="module", params=["ngram", "eagle"])
def speculative(
    request: pytest.FixtureRequest,
    expected: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    config = ngram(DRAFTS)
    if request.param == "eagle":
        config = speculating(tmp_path_factory.mktemp("head"), request.param)
    with started(STRIDE, speculative_config=config) as llm:
        yield llm


@pytest.mark.parametrize(
    ("policy", "right"), [("echo", None), ("snapkv", None), ("echo", 2), ("snapkv", DRAFTS)]
)
def test_conversations(
    speculative: Any,
    expected: dict[str, Any],
    policy: str,
    right: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafted as ever, or so many right in each step: compressions come at the same tokens, and a
    turn goes on from what the one before has packed."""
    before, wanted = counted(speculative), expected[policy]
    if right is not None:
        if not hasattr(worker(speculative).model_runner.drafter, "draft_attn_groups"):
            pytest.skip("n-grams are drafted where sampling is")
        texts = [turn.history + turn.answer for turn in wanted]
        say_drafts(speculative, texts, right, monkeypatch)
    found = conversation(speculative, kv_compress_policy=policy)
    for turn, known in zip(found, wanted, strict=True):
        assert turn.answer == known.answer
        for name in ("compressions", "context_tokens", "shared_blocks"):
            assert getattr(turn.usage, name) == getattr(known.usage, name), name
    assert [context.num_tokens for context in contexts(speculative)] == [256, 512]
    more = {name: value - before[name] for name, value in counted(speculative).items()}
    assert more["draft_tokens"] > 0
    if right:  # but where a draft ends at a compression, or with the answer
        assert more["accepted_tokens"] > 0.9 * right / DRAFTS * more["draft_tokens"]


def test_contexts_that_are_repeated(speculative: Any, expected: dict[str, Any]) -> None:
    assert repeated(speculative) == expected["repeated"]
    assert scheduler(speculative).kv_compress_manager.packed == {}
