# SPDX-License-Identifier: Apache-2.0
"""Layers with a window or chunks beside compressed ones on a GPU: FlashAttention over blocks with
other layers in between, both model runners, graphs, async scheduling."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.families import FAMILIES, OUTPUT, equal, generate, preempted, prompts, same, save
from tests.gpu.test_engine import gpu_engine
from tests.integration.engines import scheduler

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])
@pytest.mark.parametrize("name", ["Gemma 3", "padded group", "Llama 4", "Exaone 4"])
def test_layers_of_several_kinds(
    name: str, runner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    # vLLM remembers these variables for the life of a process.
    process = multiprocessing.get_context("spawn").Process(target=check, args=(name, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == 0


def check(name: str, folder: Path) -> None:
    """Tokens of the compressing engine beside those of stock vLLM, and again after preemptions."""
    # A head size that our kernels have.
    save(FAMILIES[name], folder, hidden_size=256, head_dim=64, initializer_range=0.1)
    settings = {
        "model": str(folder), "skip_tokenizer_init": True, "max_model_len": 512,
        "max_num_batched_tokens": 272,
    }  # fmt: skip
    asked = prompts(6)
    with gpu_engine(None, **settings) as llm:
        stock = generate(llm, asked)
    with gpu_engine({"ratio": 1, "max_ratio": 8, "min_prompt_tokens": 32}, **settings) as llm:
        exact = generate(llm, asked)
        # Kernels round differently, and random weights have near ties; a wrong window is not near.
        assert [tokens[0] for tokens in exact] == [tokens[0] for tokens in stock]
        print(f"{name}: {equal(exact, stock)} tokens are stock's")
        assert same(exact, stock) >= 3 * OUTPUT
        for options in ({}, {"kv_compress_ratio": 4}):
            assert all(len(tokens) == OUTPUT for tokens in preempted(llm, asked, **options))
        assert scheduler(llm).kv_compress_manager.packed == {}
