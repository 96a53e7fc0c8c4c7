# SPDX-License-Identifier: Apache-2.0
"""Draft models for tests: heads for the bundled model, with random weights, and the bundled model
as one that has such a layer itself (MTP)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.integration.simulation import MODEL


def save_head(path: Path, method: str = "eagle", **changes: int) -> str:
    """Write an EAGLE head for the bundled model.

    Args:
        method: ``eagle`` or ``eagle3``, as of ``--speculative-config``.
        changes: of its configuration.

    Returns:
        Its folder.
    """
    config = json.loads((MODEL / "config.json").read_text())
    config |= {
        "architectures": ["LlamaForCausalLM" if method == "eagle" else "LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],  # what an EAGLE-3 head is told
        "torch_dtype": "float32",
        **changes,
    }
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, size = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    third = method == "eagle3"
    shapes = {"fc.weight": (hidden, (3 if third else 2) * hidden)}
    for index in range(config["num_hidden_layers"]):
        name = "midlayer" if third and index == 0 else f"layers.{index}"
        wide = hidden * (2 if third and index == 0 else 1)
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (heads * size, wide),
            f"{name}.self_attn.k_proj.weight": (kv_heads * size, wide),
            f"{name}.self_attn.v_proj.weight": (kv_heads * size, wide),
            f"{name}.self_attn.o_proj.weight": (hidden, heads * size),
            f"{name}.mlp.gate_proj.weight": (inner, hidden),
            f"{name}.mlp.up_proj.weight": (inner, hidden),
            f"{name}.mlp.down_proj.weight": (hidden, inner),
            f"{name}.post_attention_layernorm.weight": (hidden,),
        }
        if third:
            shapes[f"{name}.hidden_norm.weight"] = (hidden,)
        if third or index:
            shapes[f"{name}.input_layernorm.weight"] = (hidden,)
    if third:
        shapes["norm.weight"] = (hidden,)
    return _save(path, config, _random(shapes))


def save_mtp(path: Path) -> str:
    """Write the bundled model as a MiMo: a Qwen 2 whose checkpoint has an MTP layer.

    Returns:
        Its folder.
    """
    config = json.loads((MODEL / "config.json").read_text())
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",  # transformers has no other; vLLM goes by the architecture
        "num_nextn_predict_layers": 1,
        "torch_dtype": "float32",
    }
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    weights = {k: v.float() for k, v in load_file(MODEL / "model.safetensors").items()}
    sizes = {
        name: config["head_dim"] * config[f"num_{heads}_heads"]
        for name, heads in (("q", "attention"), ("k", "key_value"), ("v", "key_value"))
    }
    layers = [f"model.layers.{index}" for index in range(config["num_hidden_layers"])]
    layers.append(layer := "model.mtp_layers.0")
    weights |= _random(
        {
            **{f"{layer}.self_attn.{name}_proj.weight": (n, hidden) for name, n in sizes.items()},
            f"{layer}.self_attn.o_proj.weight": (hidden, sizes["q"]),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_proj.weight": (hidden, 2 * hidden),
            **{
                f"{layer}.{name}_layernorm.weight": (hidden,)
                for name in ("token", "hidden", "final", "input", "post_attention")
            },
        }
    )
    # A Qwen 2 has biases, and vLLM's MTP layer a head of its own.
    for name in layers:
        weights |= {f"{name}.self_attn.{k}_proj.bias": torch.zeros(n) for k, n in sizes.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    _save(path, config, weights)
    for file in MODEL.glob("*token*.json"):
        shutil.copy(file, path)
    return str(path)


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }


def _save(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return str(path)
