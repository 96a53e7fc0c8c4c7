# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality through one engine, and that engine against the literal reference."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.quality.cells import DECODED, FULL, HIDDEN, PERPLEXITY, VISIBLE, Cell, Choice
from benchmarks.quality.measure import Settings, configure, generate, measure, score, start
from benchmarks.quality.prompts import GIVEN, Prompts
from benchmarks.quality.reference import ask, compare
from tests.integration.engines import FIRST_SEED
from tests.integration.simulation import MODEL

SMALL = {
    "dtype": "float32",
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 96 << 20,
    "enforce_eager": True,
}
SETTINGS = Settings(str(MODEL), "sinks=4,recent=32", SMALL, record=True)
COMPARED = [
    Choice(policy, allocator, 4.0, question)
    for question in (VISIBLE, HIDDEN)
    for policy, allocator in [("diverse", "global"), ("cake", "layer"), ("adakv", "auto")]
]
EFFECTIVE = [
    Choice("streaming", "auto", 4.0, VISIBLE),
    Choice("kv_compress", "auto", 4.0, VISIBLE),
    Choice("echo", "auto", 4.0, VISIBLE),
    Choice("echo", "auto", 4.0, VISIBLE, "policy_options.weight=0"),
    Choice("echo", "uniform", 4.0, VISIBLE),
]

GENERATED = Choice("kv_compress", "auto", 4.0, DECODED)


def started(choices: list[Choice]) -> Iterator[Any]:
    llm = start(SETTINGS, [Cell(*choice, "single", 600) for choice in choices])
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    yield from started(COMPARED + EFFECTIVE)


@pytest.fixture(scope="module")
def generating() -> Iterator[Any]:
    yield from started([GENERATED])


def test_the_engine_answers_like_the_literal_reference(llm: Any) -> None:
    """Kept keys, greedy answers and likelihoods, with ``transformers`` and sorting."""
    samples = [("kv40", 500, FIRST_SEED), (PERPLEXITY, 560, FIRST_SEED)]
    asked = list(ask(llm, SETTINGS, COMPARED, samples))
    assert len(asked) == 3 + 6
    results = compare(SETTINGS, asked)
    for choice in COMPARED:
        result = results[choice]
        assert result.unexplained == []
        assert result.same_answers == result.samples == (2 if choice.question == HIDDEN else 1)
        assert result.same_heads >= 0.9 * result.heads


def test_every_choice_takes_effect(llm: Any) -> None:
    """What one engine keeps, asked with one choice after the other and again with the first."""
    samples = [("kv40", 500, FIRST_SEED)]
    asked = ask(llm, SETTINGS, [*EFFECTIVE, EFFECTIVE[0]], samples)
    *kept, again = [[[*keys] for keys in item.kept] for item in asked]
    assert again == kept[0]
    for index, one in enumerate(kept):
        assert all(one != other for other in kept[:index]), EFFECTIVE[index]
    streaming, *_, uniform = kept
    latest = streaming[0]
    assert all(keys == latest for keys in streaming)
    assert latest[4:] == [*range(latest[-1] - len(latest) + 5, latest[-1] + 1)]
    assert len({len(keys) for keys in uniform}) == 1 < len({len(keys) for keys in kept[2]})


def test_measured_cells(llm: Any) -> None:
    seeds = [FIRST_SEED, FIRST_SEED + 1, FIRST_SEED + 5]
    policy, single = Choice("kv_compress", "auto", 4.0), ("single", 400)
    missing = {
        Cell(*Choice(FULL), *single): seeds,
        Cell(*policy._replace(question=VISIBLE), *single): seeds,
        Cell(*policy._replace(question=HIDDEN), *single): seeds[:1],
        Cell(*policy._replace(question=HIDDEN), PERPLEXITY, 560): seeds[1:2],
    }
    lines = list(measure(llm, SETTINGS, missing))
    found = {
        (line["policy"], line["question"], line["task"], line["first_seed"]): line["scores"]
        for line in lines
    }
    nats = found.pop(("kv_compress", HIDDEN, PERPLEXITY, FIRST_SEED + 1))
    assert 1 < nats[0] < 5
    assert found.pop(("kv_compress", HIDDEN, "single", FIRST_SEED)) in ([0], [1])
    assert found == {
        (policy, question, "single", first): right
        for policy, question in [(FULL, "either"), ("kv_compress", VISIBLE)]
        for first, right in ((FIRST_SEED, [1, 1]), (FIRST_SEED + 5, [1]))
    }
    for line in lines:
        if line["policy"] != FULL and "kept" in line:
            shares = [share for heads in line["kept"] for share in heads]
            assert len(shares) == 12 and 0.25 <= sum(shares) / 12 < 0.3
            assert max(shares) - min(shares) > 0.1  # heads compete
    assert sum("kept" in line for line in lines) == 3
    # A prefix cache that knows all prompts, and slices of few samples, change nothing.
    again = measure(llm, SETTINGS, missing, most_tokens=1)
    assert sorted(map(str, again)) == sorted(map(str, lines))


def test_what_is_generated_is_compressed_again_and_again(generating: Any) -> None:
    tokenizer = generating.get_tokenizer()
    source = Prompts(SETTINGS.model, tokenizer, 2048)
    samples = [("single", 500, FIRST_SEED), ("kv40", 600, FIRST_SEED), (PERPLEXITY, 560, 1)]
    prompts = [source.get(*sample) for sample in samples]

    def asked(choice: Choice) -> tuple[list[Any], list[float]]:
        configure(generating, choice, SETTINGS.base)
        outputs = generate(generating, choice, prompts)
        pairs = zip(outputs, prompts, strict=True)
        return outputs, [score(output, choice, prompt, tokenizer) for output, prompt in pairs]

    _, as_prompts = asked(Choice(FULL))
    outputs, kept_all = asked(GENERATED._replace(ratio=1.0))
    assert [output.kv_compress.compressions for output in outputs] == [0, 0, 0]
    assert as_prompts[:2] == kept_all[:2] == [1, 1]
    # Whether keys came from a prompt or by decoding makes no difference but for rounding.
    assert kept_all[2] == pytest.approx(as_prompts[2], abs=1e-4)
    outputs, compressed = asked(GENERATED)
    for output, prompt in zip(outputs, prompts, strict=True):
        assert list(output.prompt_token_ids) == prompt.tokens[:GIVEN]
        usage = output.kv_compress
        assert usage.compressions >= 2
        # After the last one: a quarter, and what filled the tail.
        assert usage.blocks_after == -(-usage.blocks_before // 4)
    assert abs(compressed[2] - kept_all[2]) > 0.01
    again, same = asked(GENERATED)
    assert same == compressed and [output.kv_compress for output in again] == [
        output.kv_compress for output in outputs
    ]


def test_measured_cells_of_generations(generating: Any) -> None:
    cell = Cell(*GENERATED, "kv40", 600)
    (line,) = measure(generating, SETTINGS, {cell: [FIRST_SEED, FIRST_SEED + 1]})
    assert line["question"] == DECODED and len(line["scores"]) == 2
    assert line["compressions"] >= 2
    shares = [share for heads in line["kept"] for share in heads]
    assert 0.25 <= sum(shares) / 12 < 0.3 and max(shares) - min(shares) > 0.1


def test_an_engine_of_its_own_where_the_scheduler_must_know(llm: Any) -> None:
    for name, value in (("recent", 48), ("sinks", 0), ("min_tokens_per_head", 64), ("window", 65)):
        with pytest.raises(Exception, match=f"{name}={value}"):
            llm.collective_rpc("quality_configure", args=({"recent": 32, name: value},))
    with pytest.raises(Exception, match="query_stride=32"):
        llm.collective_rpc("quality_configure", args=({"recent": 32, "policy": "roco"},))
