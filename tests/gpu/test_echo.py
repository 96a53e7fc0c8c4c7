# SPDX-License-Identifier: Apache-2.0
"""The policy echo on a GPU, in bf16: chunks and prefix cache hits keep (nearly) the same keys.

Products of other shapes round differently in bf16, so the keys themselves differ in the last bit.
"""

from __future__ import annotations

import random

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from vllm import SamplingParams

from tests.gpu.test_engine import PROMPTS as TASKS
from tests.gpu.test_engine import gpu_engine, right
from tests.integration.engines import greedy

pytestmark = pytest.mark.gpu

OPTIONS = {"policy": "echo", "policy_options": {"weight": 0}, "ratio": 4}
FORMATS = pytest.mark.parametrize("page_dtype", ["auto", "fp8"])


def prompt(seed: int, length: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(3, 1000) for _ in range(length)]


PROMPTS = [prompt(i, n) for i, n in enumerate((700, 1500, 300, 1030))]


def read(llm, prompts, max_tokens=2):
    llm.collective_rpc("kv_compress_record")
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    (record,) = llm.collective_rpc("kv_compress_record")
    kept = {name.split("-")[0]: keys for name, keys in record.items()}
    return outputs, [kept[output.request_id.split("-")[0]] for output in outputs]


def alike(one, other) -> float:
    """Share of kept keys that both have, of the prompt that differs most."""
    return min(
        sum(len({*a} & {*b}) for a, b in zip(x, y, strict=True)) / sum(map(len, x))
        for x, y in zip(one, other, strict=True)
    )


@FORMATS
def test_chunks_and_hits_keep_the_same_keys(page_dtype: str) -> None:
    options = {**OPTIONS, "page_dtype": page_dtype}
    kept = {}
    for budget in (300, 4096):
        with gpu_engine(options, max_num_batched_tokens=budget, max_num_seqs=8) as llm:
            kept[budget] = read(llm, PROMPTS)[1]
            outputs, again = read(llm, PROMPTS)
            assert [output.num_cached_tokens for output in outputs] == [512, 1280, 256, 768]
            assert alike(kept[budget], again) > 0.97
    assert alike(kept[300], kept[4096]) > 0.97


@FORMATS
def test_generations_are_scored_and_compressed_again(page_dtype: str) -> None:
    with gpu_engine({**OPTIONS, "page_dtype": page_dtype}) as llm:
        outputs, kept = read(llm, PROMPTS, 400)
        assert all(len(output.outputs[0].token_ids) == 400 for output in outputs)
        # Of the keys that compete at last, some that were decoded are kept by more than recency.
        held = [max(len(keys) for keys in heads) for heads in kept]
        assert min(held) > 0
        assert alike(kept, read(llm, PROMPTS, 400)[1]) > 0.5  # texts may part in bf16


def test_answers() -> None:
    with gpu_engine({"policy": "echo", "ratio": 2}) as llm:
        assert right(llm, greedy(llm, TASKS, 16)) >= 18
