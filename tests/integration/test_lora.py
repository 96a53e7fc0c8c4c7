# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside compression."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.integration.engines import engine, samples, scheduler
from tests.integration.simulation import MODEL

PAIRS = samples("single", 700, 2, offset=3100)
PROMPTS = [prompt for prompt, _ in PAIRS]
ANSWERS = [answer for _, answer in PAIRS]


@pytest.fixture
def adapter(tmp_path: Path) -> LoRARequest:
    """A random LoRA adapter in peft's format, strong enough to change what is generated."""
    config = json.loads((MODEL / "config.json").read_text())
    hidden, size = config["hidden_size"], config["head_dim"]
    widths = {
        "q_proj": config["num_attention_heads"] * size,
        "k_proj": config["num_key_value_heads"] * size,
        "v_proj": config["num_key_value_heads"] * size,
    }
    torch.manual_seed(0)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(8, hidden) / 16
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, 8) / 2
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    peft = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": list(widths)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft))
    return LoRARequest("random", 1, str(tmp_path))


def generated(options: dict[str, Any] | None, adapter: LoRARequest) -> list[Any]:
    """Tokens without the adapter, then with it, and the blocks that were packed."""
    sampling = SamplingParams(temperature=0, max_tokens=20)
    found: list[Any] = []
    with engine(options, enable_lora=True, max_lora_rank=8, max_num_batched_tokens=256) as llm:
        # One after the other: vLLM's CPU kernels apply an adapter to a whole batch.
        for lora in (None, adapter):
            outputs = llm.generate(PROMPTS, sampling, use_tqdm=False, lora_request=lora)
            found.append([list(output.outputs[0].token_ids) for output in outputs])
        texts = [llm.get_tokenizer().decode(ids, skip_special_tokens=True) for ids in found[0]]
        assert [text.strip() for text in texts] == ANSWERS
        if options:
            pool = scheduler(llm).kv_compress_manager.block_pool
            assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    return found


def test_lora(adapter: LoRARequest) -> None:
    """The same prompts, so that the prefix cache has to tell the adapter's blocks apart."""
    base, adapted = generated(None, adapter)
    assert adapted != base
    assert generated({"ratio": 1}, adapter) == [base, adapted]
    compressed_base, compressed = generated({"ratio": 8}, adapter)
    assert compressed_base == base and compressed != base
    # The first token precedes the compression.
    assert [ids[0] for ids in compressed] == [ids[0] for ids in adapted]
