# SPDX-License-Identifier: Apache-2.0
"""Layers with a state in the place of keys beside compressed ones on a GPU: kernel blocks in decode
graphs and in FlashAttention, states of vLLM's Triton kernels in the same buffer, zeroed blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.families import FAMILIES, OUTPUT, check_alike, generate, preempted, prompts, save
from tests.gpu.test_engine import gpu_engine
from tests.integration.engines import scheduler

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 256, "head_dim": 64, "initializer_range": 0.1}
"""A head size that our kernels have."""
CHANGES = {
    "LFM 2": {"conv_dim": 256, "conv_dim_out": 256, "block_dim": 256, "conv_L_cache": 4},
    "Granite 4": {"mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 64},
    "Nemotron-H": {"mamba_num_heads": 16, "mamba_head_dim": 32, "ssm_state_size": 64},
    "Falcon-H1": {"mamba_d_ssm": 512, "mamba_n_heads": 16, "mamba_d_head": 32,
                  "mamba_d_state": 64},
    "Qwen3-Next": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("name", CHANGES)
def test_states_beside_pages(
    name: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    save(FAMILIES[name], tmp_path, **{**WIDE, **CHANGES[name]})
    settings = {
        "model": str(tmp_path), "skip_tokenizer_init": True, "max_model_len": 1024,
        "max_num_batched_tokens": 272, "enforce_eager": eager, "enable_prefix_caching": False,
    }  # fmt: skip
    if name == "Qwen3-Next":
        settings["gdn_prefill_backend"] = "triton"  # by default FlashInfer, which is not everywhere
    asked = prompts(6, 700)
    with gpu_engine(None, **settings) as llm:
        stock = generate(llm, asked)
    with gpu_engine({"ratio": 1, "max_ratio": 8, "min_prompt_tokens": 32}, **settings) as llm:
        group = scheduler(llm).kv_compress_group
        print(f"{name}: blocks of {group.kernel_blocks} kernel blocks")
        check_alike(name, generate(llm, asked), stock)
        # Full blocks that held states are zeroed and reused, and rows are packed and grow.
        for options in ({}, {"kv_compress_ratio": 4}):
            assert all(len(tokens) == OUTPUT for tokens in preempted(llm, asked, **options))
        packed = generate(llm, asked, kv_compress_ratio=4)
        assert packed == generate(llm, asked, kv_compress_ratio=4)
        assert scheduler(llm).kv_compress_manager.packed == {}
