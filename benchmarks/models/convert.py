# SPDX-License-Identifier: Apache-2.0
"""A GGUF file as a Hugging Face directory: Llama and Gemma 3 text models.

What llama.cpp changed on the way is undone: it interleaves the two halves of RoPE in the query and
key projections of Llama, and stores Gemma's norms as ``1 + weight``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.models.tokenizer import tokenizer

Fields = dict[str, Any]
"""What a GGUF file says of itself, by its own keys."""

ARCHITECTURES = ("llama", "gemma3")
_PERIOD = 6
"""Gemma 3: every sixth layer sees everything, the others a sliding window."""

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3": {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


def convert(file: Path, directory: Path, dtype: str, packages: Path | None = None) -> str:
    """Write ``config.json``, ``generation_config.json``, ``model.safetensors`` and the tokenizer.

    Args:
        dtype: of the weights, by torch's name.
        packages: where the package ``gguf`` is, if it cannot be imported.

    Returns:
        Name, number of parameters, dtype.

    Raises:
        ValueError: a model of another architecture.
    """
    if packages is not None:
        sys.path.append(str(packages))
    import gguf

    reader = gguf.GGUFReader(file)
    fields: Fields = {name: field.contents() for name, field in reader.fields.items()}
    kind = fields["general.architecture"]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"architecture {kind!r} of {file} is not accepted; it must be one of "
            + ", ".join(ARCHITECTURES)
        )

    def dequantised() -> Iterator[tuple[str, Tensor]]:
        for tensor in reader.tensors:
            shape = tuple(int(size) for size in reversed(tensor.shape))
            data = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            yield tensor.name, torch.from_numpy(data.reshape(shape))

    directory.mkdir(parents=True, exist_ok=True)
    state = {
        renamed: undone(name, data, fields).to(getattr(torch, dtype)).contiguous().clone()
        for name, data in dequantised()
        if (renamed := renamed_tensor(name, kind)) is not None
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = config_of(fields, "lm_head.weight" not in state, dtype)
    _write(directory / "config.json", config)
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    _write(directory / "generation_config.json", {name: config[name] for name in special})
    tokenizer(fields).save_pretrained(directory)
    size = sum(data.numel() for data in state.values())
    return f"{fields.get('general.name', file.stem)}, {size:,} parameters, {dtype}"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def renamed_tensor(name: str, kind: str) -> str | None:
    """GGUF's name of a tensor as ``transformers`` has it; None: a table it computes itself."""
    stem, part = name.rsplit(".", 1)
    if stem == "rope_freqs":
        return None
    if not stem.startswith("blk."):
        return f"{_OUTSIDE[stem]}.{part}"
    _, layer, inner = stem.split(".")
    return f"model.layers.{layer}.{(_LAYER | _NORMS[kind])[inner]}.{part}"


def undone(name: str, data: Tensor, fields: Fields) -> Tensor:
    """The tensor as ``transformers`` has it."""
    kind = fields["general.architecture"]
    if kind == "gemma3" and name.endswith("norm.weight"):
        return data - 1
    for projection, count in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
        if kind == "llama" and name.endswith(f".{projection}.weight"):
            heads = fields[f"{kind}.attention.{count}"]
            return data.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return data


def config_of(fields: Fields, tied: bool, dtype: str) -> dict[str, Any]:
    """``config.json``."""
    kind = fields["general.architecture"]

    def of(name: str, default: Any = None) -> Any:
        return fields.get(f"{kind}.{name}", default)

    heads, hidden, layers = of("attention.head_count"), of("embedding_length"), of("block_count")
    head_dim = of("attention.key_length") or of("rope.dimension_count") or hidden // heads
    common = {
        "hidden_size": hidden,
        "intermediate_size": of("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": of("context_length"),
        "rms_norm_eps": round(float(of("attention.layer_norm_rms_epsilon")), 12),
        "rope_theta": of("rope.freq_base", 10000.0),
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if kind == "llama":
        own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return common | own | {"mlp_bias": False}
    return common | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": head_dim,
        "sliding_window": of("attention.sliding_window"),
        "layer_types": [
            "sliding_attention" if (layer + 1) % _PERIOD else "full_attention"
            for layer in range(layers)
        ],
        "rope_local_base_freq": 10000.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
