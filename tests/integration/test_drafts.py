# SPDX-License-Identifier: Apache-2.0
"""Draft models (EAGLE heads) on the real engine: the same answers with them and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from kvcompress_vllm import LLM
from tests.integration.engines import engine, greedy, scheduler
from tests.integration.heads import save_head
from tests.integration.simulation import MODEL
from tests.integration.test_speculation import (
    DRAFTS,
    LENGTH,
    MEMORY,
    PROMPTS,
    counted,
    test_others_than_greedy_requests,
)

__all__ = ["test_others_than_greedy_requests"]

OPTIONS = {"ratio": 8, "min_prompt_tokens": 64, "interval": 2, "recent": 16, "max_ratio": 32}


def speculating(folder: Path, method: str = "eagle", **changes: int) -> dict[str, Any]:
    return {
        "method": method,
        "model": save_head(folder, method, **changes),
        "num_speculative_tokens": DRAFTS,
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return without()


def without(model: str | Path = MODEL) -> dict[str, list[list[int]]]:
    """Without speculation, at the engine's ratio and uncompressed; and what is kept."""
    with engine(OPTIONS, model=str(model), kv_cache_memory_bytes=MEMORY) as llm:
        compressed = greedy(llm, PROMPTS, LENGTH, ignore_eos=True)
        exact = greedy(llm, PROMPTS, LENGTH, ignore_eos=True, extra_args={"kv_compress_ratio": 1})
        worker(llm).kv_compress_record()
        greedy(llm, PROMPTS[1:2], LENGTH, ignore_eos=True)
        kept = worker(llm).kv_compress_record(on=False)
    return {"compressed": compressed, "exact": exact, "kept": list(kept.values())[-1]}


@pytest.fixture(scope="module", params=["eagle", "eagle3"])
def speculative(
    request: pytest.FixtureRequest,
    expected: dict[str, list[list[int]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    with engine(
        OPTIONS,
        kv_cache_memory_bytes=MEMORY,
        speculative_config=speculating(tmp_path_factory.mktemp("head"), request.param),
        disable_log_stats=False,
    ) as llm:
        yield llm


def worker(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


def test_answers_are_the_same(speculative: Any, expected: dict[str, list[list[int]]]) -> None:
    (group,) = worker(speculative).model_runner.drafter.draft_attn_groups
    builder = group.get_metadata_builder()
    assert builder.drafts and builder.context is worker(speculative).kv_compress_context
    state = builder.context.state
    assert state.group.draft_layers == 1 and state.group.layers == 7
    assert greedy(speculative, PROMPTS, LENGTH, ignore_eos=True) == expected["compressed"]
    again = greedy(speculative, PROMPTS[:2], LENGTH, ignore_eos=True)  # prefix hits
    assert again == expected["compressed"][:2]
    exact = greedy(
        speculative, PROMPTS, LENGTH, ignore_eos=True, extra_args={"kv_compress_ratio": 1}
    )
    assert exact == expected["exact"]
    assert counted(speculative)["drafts"] > 100
    assert scheduler(speculative).kv_compress_manager.packed == {}


def test_the_model_keeps_what_it_would_without(
    speculative: Any, expected: dict[str, list[list[int]]]
) -> None:
    worker(speculative).kv_compress_record()
    greedy(speculative, PROMPTS[1:2], LENGTH, ignore_eos=True)
    kept = worker(speculative).kv_compress_record(on=False)
    assert list(kept.values())[-1] == expected["kept"] and len(expected["kept"]) == 12


def say_drafts(
    llm: Any, texts: list[list[int]], right: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace what is drafted behind the tokens of a request: the first of each step go on as the
    longest of ``texts`` that begins so, the others are wrong."""
    texts = sorted(texts, key=len, reverse=True)
    runner = worker(llm).model_runner
    stock = runner.take_draft_token_ids

    def say(tokens: list[int]) -> list[int]:
        going_on = (t for t in texts if t[: len(tokens)] == tokens[: len(t)])
        text = next(going_on, [])
        found = text[len(tokens) : len(tokens) + DRAFTS]
        found += [3] * (DRAFTS - len(found))
        return [*found[:right], *((token + 1) % 1000 for token in found[right:])]

    def take() -> Any:
        found = stock()
        for name, drafted in zip(found.req_ids, found.draft_token_ids, strict=True):
            request = runner.requests[name]
            tokens = [*request.prompt_token_ids, *request.output_token_ids]
            drafted[:] = say(tokens)[: len(drafted)]
        return found

    monkeypatch.setattr(runner, "take_draft_token_ids", take)


@pytest.mark.parametrize("right", [True, False])
def test_all_or_nothing_is_accepted(
    speculative: Any,
    expected: dict[str, list[list[int]]],
    right: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every border: where a compression is due, where a block and the window begin. The head
    drafts as ever, so that its keys are what it makes of them; what it says is replaced."""
    tokenizer = speculative.get_tokenizer()
    texts = [tokenizer.encode(p) + e for p, e in zip(PROMPTS, expected["compressed"], strict=True)]

    say_drafts(speculative, texts, DRAFTS if right else 0, monkeypatch)
    before = counted(speculative)
    answers = greedy(speculative, PROMPTS, LENGTH, ignore_eos=True)
    assert answers == expected["compressed"]
    more = {name: value - before[name] for name, value in counted(speculative).items()}
    assert more["drafts"] > 100
    if right:
        assert more["accepted_tokens"] > 0.9 * more["draft_tokens"]
    else:
        assert more["accepted_tokens"] == 0


def test_what_is_told_of_drafts(speculative: Any) -> None:
    """With each response what is its own; in the metrics by whether the request was packed."""

    def ours() -> dict[tuple[str, str], float]:
        return {
            (sample.name.removeprefix("kv_compress:"), sample.labels["packed"]): sample.value
            for family in REGISTRY.collect()
            for sample in family.samples
            if "packed" in sample.labels
        }

    for ratio, packed in ((8, "yes"), (1, "no")):
        params = SamplingParams(
            temperature=0, max_tokens=LENGTH, ignore_eos=True,
            extra_args={"kv_compress_ratio": ratio},
        )  # fmt: skip
        before, first = counted(speculative), ours()
        outputs = speculative.generate(PROMPTS, params, use_tqdm=False)
        more = {name: value - before[name] for name, value in counted(speculative).items()}
        told = {key: value - first[key] for key, value in ours().items()}
        for name in ("draft_tokens", "accepted_tokens"):
            each = [getattr(output.kv_compress, name) for output in outputs]
            assert sum(each) == more[name]
            assert sum(told[f"{name}_total", side] for side in ("no", "yes")) == more[name]
        assert all(output.kv_compress.draft_tokens > 0 for output in outputs)
        assert told["draft_tokens_total", packed] > 0.9 * more["draft_tokens"]
        assert all(bool(output.kv_compress.compressions) == (ratio > 1) for output in outputs)


def test_preempted_requests(speculative: Any, expected: dict[str, list[list[int]]]) -> None:
    """In their prompts, and while they decode with something drafted: they start anew."""
    inner = speculative.llm_engine
    for ratio in (1, 8):
        params = SamplingParams(
            temperature=0, max_tokens=LENGTH, ignore_eos=True,
            extra_args={"kv_compress_ratio": ratio},
        )  # fmt: skip
        for index, prompt in enumerate(PROMPTS):
            inner.add_request(f"{ratio}-{index}", prompt, params)
        found: dict[str, list[int]] = {}
        steps = 0
        while inner.has_unfinished_requests():
            for output in inner.step():
                if output.finished:
                    found[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            if steps in (1, 8, 40):
                assert scheduler(speculative).reset_prefix_cache(reset_running_requests=True)
        answers = [found[f"{ratio}-{index}"] for index in range(len(PROMPTS))]
        if ratio == 1:
            assert answers == expected["exact"]
        assert all(len(tokens) == LENGTH for tokens in answers) and steps > 40
    assert scheduler(speculative).kv_compress_manager.packed == {}


def test_draft_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 KV heads of size 64 .* has 2 of size 64.*ngram"):
        LLM(str(MODEL), kv_compress=OPTIONS,
            speculative_config=speculating(tmp_path, num_key_value_heads=4))  # fmt: skip


@pytest.mark.parametrize("given", [None, "CUSTOM", "FLASH_ATTN"])
def test_layers_of_a_draft_model_run_on_our_backend(tmp_path: Path, given: str | None) -> None:
    """Left to itself, runner V1 selects another for them; only together they can share blocks."""
    asked = {**speculating(tmp_path), "attention_backend": given}
    args = EngineArgs(
        str(MODEL), max_model_len=2048, dtype="float32", speculative_config=asked,
        additional_config={"kv_compress": OPTIONS},
    )  # fmt: skip
    if given == "FLASH_ATTN":
        with pytest.raises(ValueError, match="attention_backend=FLASH_ATTN; with --kv-compress"):
            args.create_engine_config()
        return
    found = args.create_engine_config().speculative_config
    assert found is not None and found.attention_backend is AttentionBackendEnum.CUSTOM
