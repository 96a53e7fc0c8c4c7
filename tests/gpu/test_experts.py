# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts on a GPU: both model runners, and experts spread over two GPUs."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.families import FAMILIES, OUTPUT, check_alike, generate, params, preempted, prompts, save
from tests.gpu.test_engine import gpu_engine
from tests.integration.engines import scheduler

pytestmark = pytest.mark.gpu

OPTIONS = {"ratio": 1, "max_ratio": 8, "min_prompt_tokens": 32}
SETTINGS: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 512,
                            "max_num_batched_tokens": 272}  # fmt: skip


def model(folder: Path) -> dict[str, Any]:
    """A Qwen 3 MoE with sizes that the kernels of attention and of experts have."""
    save(FAMILIES["Qwen 3 MoE"], folder, hidden_size=256, head_dim=64, moe_intermediate_size=128,
         initializer_range=0.1)  # fmt: skip
    return {"model": str(folder), **SETTINGS}


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])
def test_one_gpu(runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    # vLLM remembers these variables for the life of a process.
    process = multiprocessing.get_context("spawn").Process(target=check, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def check(folder: Path) -> None:
    settings, asked = model(folder), prompts(6)
    with gpu_engine(None, **settings) as llm:
        stock = generate(llm, asked)
    with gpu_engine(OPTIONS, **settings) as llm:
        check_alike("experts", generate(llm, asked), stock)
        for options in ({}, {"kv_compress_ratio": 4}):
            assert all(len(tokens) == OUTPUT for tokens in preempted(llm, asked, **options))
        assert scheduler(llm).kv_compress_manager.packed == {}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_expert_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    settings, asked = model(tmp_path), prompts(6)
    spread = {**settings, "tensor_parallel_size": 2, "enable_expert_parallel": True}
    with gpu_engine(None, **spread) as llm:
        stock = generate(llm, asked)
    with gpu_engine(OPTIONS, **spread) as llm:
        check_alike("experts", generate(llm, asked), stock)
        compressed = generate(llm, asked, kv_compress_ratio=4)
        assert compressed == generate(llm, asked, kv_compress_ratio=4)
        together = llm.generate(
            [{"prompt_token_ids": ids} for ids in asked], params(kv_compress_ratio=4),
            use_tqdm=False,
        )  # fmt: skip
        assert all(len(output.outputs[0].token_ids) == OUTPUT for output in together)
        assert all(output.kv_compress.compressions for output in together)
