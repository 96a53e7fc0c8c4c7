# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality through one engine, and that engine against the literal reference."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.quality.cells import FULL, HIDDEN, PERPLEXITY, VISIBLE, Cell, Choice
from benchmarks.quality.measure import Settings, measure, start
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


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    llm = start(SETTINGS, [Cell(*choice, "single", 600) for choice in COMPARED])
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


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


def test_an_engine_of_its_own_where_the_scheduler_must_know(llm: Any) -> None:
    for name, value in (("recent", 48), ("sinks", 0), ("min_tokens_per_head", 64), ("window", 65)):
        with pytest.raises(Exception, match=f"{name}={value}"):
            llm.collective_rpc("quality_configure", args=({"recent": 32, name: value},))
    with pytest.raises(Exception, match="query_stride=32"):
        llm.collective_rpc("quality_configure", args=({"recent": 32, "policy": "roco"},))
