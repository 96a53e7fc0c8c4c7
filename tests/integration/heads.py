# SPDX-License-Identifier: Apache-2.0
"""Draft models for tests: heads for the bundled model, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

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
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")
    return str(path)
