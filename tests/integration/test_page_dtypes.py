# SPDX-License-Identifier: Apache-2.0
"""Packed pages of fewer bits in the real engine on the bundled model; integrity is checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from kvcompress_vllm import LLM, policies
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.config.options import OPTIONS
from kvcompress_vllm.integration.start.flags import resolved_config
from tests.integration.engines import engine, greedy, samples, scheduler
from tests.integration.simulation import MODEL

B, BLOCK_BYTES = 16, 16 * 12 * 2 * 64 * 2
"""Of a block: 12 heads of 64 channels in bfloat16."""


@pytest.fixture(scope="module", params=["fp8", "int4"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    options = {"page_dtype": request.param, "ratio": 4, "allow_policies": True}
    with engine(options, dtype="bfloat16", max_num_batched_tokens=1024) as running:
        yield running


def fold(llm: LLM) -> int:
    """Keys that are packed in the bytes of one."""
    page_format: PageFormat = scheduler(llm).kv_compress_planner.config.page_format
    return page_format.blocks_per_page


def test_needles_are_found_in_a_quarter_of_the_memory(llm: LLM) -> None:
    asked = [s for task, n in (("single", 600), ("multikey", 800)) for s in samples(task, n, 2)]
    prompts = [prompt for prompt, _ in asked]
    tokenizer = llm.get_tokenizer()
    for _ in range(2):  # the second time from the prefix cache
        replies = tokenizer.batch_decode(greedy(llm, prompts, 16), skip_special_tokens=True)
        assert [answer in reply for (_, answer), reply in zip(asked, replies, strict=True)] == (
            [True] * 4
        )
    (output,) = llm.generate([prompts[0]], SamplingParams(max_tokens=2), use_tqdm=False)
    usage, length, m = output.kv_compress, len(output.prompt_token_ids), fold(llm)
    covered = length // (B * m) * m
    assert usage.blocks_before == -(-length // B) and usage.compressions == 1
    assert usage.blocks_after == -(-covered // 4) + usage.blocks_before - covered
    assert usage.bytes_after == usage.blocks_after * BLOCK_BYTES


def test_a_question_after_a_protected_context(llm: LLM) -> None:
    ((prompt, answer),) = samples("single", 700, 1)
    tokens = llm.get_tokenizer().encode(prompt)
    params = SamplingParams(
        temperature=0,
        max_tokens=16,
        extra_args={"kv_compress_context_tokens": 500, "kv_compress_protect": "0:500"},
    )
    (output,) = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)
    assert answer in output.outputs[0].text and output.kv_compress.compressions >= 1


def test_generations_are_packed_again_and_again(llm: LLM) -> None:
    """Several at once in a small budget; none that is kept is drifting away."""
    prompts = [prompt for prompt, _ in samples("single", 200, 3)]
    params = SamplingParams(
        temperature=0,
        max_tokens=500,
        ignore_eos=True,
        extra_args={"kv_compress_budget_tokens": 64},
    )
    for output in llm.generate(prompts, params, use_tqdm=False):
        assert len(output.outputs[0].token_ids) == 500
        assert output.kv_compress.compressions >= 3
        assert output.kv_compress.blocks_after <= 4 + 2 * fold(llm)


def test_every_policy(llm: LLM) -> None:
    ((prompt, _),) = samples("kv10", 300, 1)
    names = [name for name in policies.BUILT_IN if not policies.find(name).observes_all]
    params = [
        SamplingParams(max_tokens=3, ignore_eos=True, extra_args={"kv_compress_policy": name})
        for name in names
    ]
    for output in llm.generate([prompt] * len(names), params, use_tqdm=False):
        assert output.outputs[0].finish_reason == "length"
        assert output.kv_compress.compressions == 1


def test_a_mass(llm: LLM) -> None:
    ((prompt, _),) = samples("single", 600, 1)
    params = SamplingParams(max_tokens=3, extra_args={"kv_compress_mass": 0.9})
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    usage = output.kv_compress
    assert usage.compressions == 1
    assert usage.blocks_after <= usage.blocks_before / fold(llm) + fold(llm)


def configured(options: dict[str, Any], **arguments: Any) -> VllmConfig:
    arguments = {"max_model_len": 2048, "dtype": "bfloat16", **arguments}
    args = EngineArgs(str(MODEL), additional_config={"kv_compress": options}, **arguments)
    return args.create_engine_config()


@pytest.mark.parametrize(
    ("options", "dtype", "chosen"),
    [
        ({}, "bfloat16", ("fp8", 2)),
        ({}, "float16", ("fp8", 2)),
        ({}, "float32", ("auto", 2)),
        ({"ratio": 8}, "bfloat16", ("fp8", 8)),
        ({"mass": 0.9}, "bfloat16", ("fp8", None)),
        ({"page_dtype": "auto"}, "bfloat16", ("auto", 2)),
        ({"page_dtype": "int4"}, "bfloat16", ("int4", 2)),
        ({"min_ratio": 2, "ratio": 2.5}, "float32", ("auto", 2.5)),
    ],
)
def test_what_pages_hold_follows_the_cache(
    options: dict[str, Any], dtype: str, chosen: tuple[str, float | None]
) -> None:
    found = resolved_config(configured(options, dtype=dtype))
    assert found is not None and (found.page_dtype, found.ratio) == chosen
    assert found.allowed_policies() == (found.policy,)


def test_a_choice_is_for_one_engine_only() -> None:
    """The user's arguments may be used again, for a model whose cache is another."""
    args = EngineArgs(
        str(MODEL), max_model_len=2048, dtype="bfloat16", additional_config={"kv_compress": {}}
    )
    found = []
    for dtype in ("bfloat16", "float32", "bfloat16"):
        args.dtype = dtype
        config = resolved_config(args.create_engine_config())
        assert config is not None
        found.append((config.page_dtype, config.ratio))
    assert found == [("fp8", 2), ("auto", 2), ("fp8", 2)]


def test_heads_that_8_bits_do_not_fit_keep_16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ModelConfig, "get_head_size", lambda self: 40)
    logging.getLogger("vllm").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "vllm.kv_compress"):
        found = resolved_config(configured({}))
    logging.getLogger("vllm").removeHandler(caplog.handler)
    assert found is not None and (found.page_dtype, found.ratio) == ("auto", 2)
    assert "page_dtype=auto, for page_dtype=fp8 needs a head size that 16 divides" in caplog.text


def test_caches_that_cannot_have_it_are_refused() -> None:
    for options, problem in (
        ({"page_dtype": "int4"}, "page_dtype=int4 needs a cache of float16 or bfloat16"),
        ({"page_dtype": "int2"}, "page_dtype='int2' is not accepted"),
    ):
        with pytest.raises(ValueError, match=problem), engine(options, dtype="float32"):
            pass


def test_a_peak_that_holds_no_packed_page_is_refused() -> None:
    options = {"page_dtype": "int4", "ratio": 4, "prefill_peak_tokens": 256}
    refused = pytest.raises(ValueError, match="256 tokens of a packed page")
    with refused, engine(options, dtype="bfloat16", block_size=64):
        pass


def test_options_are_the_formats() -> None:
    assert OPTIONS["page_dtype"].metadata["accepted"] == "one of auto, fp8, int4"
    assert [each.label for each in PageFormat] == ["auto", "fp8", "int4"]
