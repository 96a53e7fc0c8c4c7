# SPDX-License-Identifier: Apache-2.0
"""Engines for tests: in this process, on the bundled model."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from vllm import SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from benchmarks.retrieval import TaskGen
from kvcompress_vllm import LLM
from tests.integration.simulation import MODEL

FIRST_SEED = 100_000
"""Test seeds start here; see benchmarks/retrieval/README.md."""


@cache
def generator() -> TaskGen:
    return TaskGen.load(MODEL)


def samples(task: str, length: int, count: int, offset: int = 0) -> list[tuple[str, str]]:
    """(prompt, answer) pairs from test seeds."""
    first = FIRST_SEED + offset
    return [generator().task(task, length, seed) for seed in range(first, first + count)]


@contextlib.contextmanager
def engine(options: dict[str, Any] | None = None, **arguments: Any) -> Iterator[LLM]:
    """An LLM on the bundled model, or ``model=``; ``options`` None leaves compression off."""
    defaults = {
        "model": str(MODEL),
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "block_size": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": True,
    }
    llm = LLM(kv_compress=options, **{**defaults, **arguments})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def scheduler(llm: LLM) -> Any:
    """The engine's scheduler (it lives in this process)."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def greedy(llm: LLM, prompts: list[str], max_tokens: int = 24, **params: Any) -> list[list[int]]:
    """Greedy token ids per prompt, end of text included."""
    # vLLM refuses n > 1 at temperature 0; top_k = 1 is greedy as well.
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": max_tokens, **params})
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [list(choice.token_ids) for output in outputs for choice in output.outputs]


def gaps(
    llm: LLM, prompts: list[str], answers: list[list[int]], **params: Any
) -> list[tuple[int, float]]:
    """Where answers leave those of this engine, as (token, by how much this engine preferred its
    own there); (length, 0) where they do not. Rounding flips near ties alone.

    Args:
        params: of the requests; at most the five likeliest tokens are known, others are infinitely
            far.
    """
    length = max(map(len, answers))
    sampling = SamplingParams(temperature=0, max_tokens=length, logprobs=5, **params)
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    found = []
    for output, answer in zip(outputs, answers, strict=True):
        own = output.outputs[0]
        pairs = enumerate(zip(own.token_ids, answer, strict=True))
        index = next((i for i, (a, b) in pairs if a != b), None)
        if index is None:
            found.append((length, 0.0))
            continue
        known = {token: entry.logprob for token, entry in own.logprobs[index].items()}
        other = known.get(answer[index], -math.inf)
        found.append((index, known[own.token_ids[index]] - other))
    return found


@cache
def transformers_greedy(prompts: tuple[str, ...], dtype: torch.dtype, max_tokens: int) -> Any:
    """What ``transformers`` generates greedily for each prompt on its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    results = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=max_tokens, do_sample=False)
        results.append(out[0, ids.shape[1] :].tolist())
    return results
