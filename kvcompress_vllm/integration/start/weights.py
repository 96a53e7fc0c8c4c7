# SPDX-License-Identifier: Apache-2.0
"""How many bytes a model's weights take, without reading them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

_SAFETENSORS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""Bytes of a number by its name in safetensors; of others one."""


class Weights(NamedTuple):
    """Bytes of all weights, and how that is known."""

    num_bytes: int
    source: str


def weights(model: str, text: Any) -> Weights:
    """Bytes of a model's weights, from the index or the headers of its files where it has any.

    Args:
        text: the configuration of its language model.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            total = json.loads(index.read_text()).get("metadata", {}).get("total_size")
            if total:
                return Weights(int(total), "the index of its safetensors files")
        files = sorted(folder.glob("*.safetensors"))
        if files:
            return Weights(sum(map(_tensors, files)), "the headers of its safetensors files")
    else:
        try:
            from huggingface_hub import get_safetensors_metadata

            counts = get_safetensors_metadata(model).parameter_count
            total = sum(count * _SAFETENSORS.get(name, 1) for name, count in counts.items())
            return Weights(total, "the headers of its safetensors files")
        except Exception:  # offline, or none there: the configuration will do
            pass
    return Weights(_estimated(text), "estimated from its configuration")


def _tensors(path: Path) -> int:
    """Bytes of the tensors of a safetensors file; only its header is read."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return max((entry["data_offsets"][1] for entry in header.values()), default=0)


def _estimated(text: Any) -> int:
    """Of a decoder with gated MLPs, as most are."""

    def first(*names: str, default: int) -> int:
        return next((int(v) for n in names if (v := getattr(text, n, None))), default)

    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    size = first("head_dim", default=hidden // heads)
    kv = first("num_key_value_heads", default=heads)
    experts = first("num_local_experts", "num_experts", "n_routed_experts", default=1)
    wide = first("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    if experts > 1:
        wide = first("moe_intermediate_size", default=wide)
    embeddings = text.vocab_size * hidden * (1 if text.tie_word_embeddings else 2)
    inner = layers * (2 * hidden * size * (heads + kv) + 3 * hidden * wide * experts)
    quantised = getattr(text, "quantization_config", None) or {}
    if not isinstance(quantised, dict):
        quantised = quantised.to_dict()
    bits = quantised.get("bits") or (8 if quantised else 16)
    return int(2 * embeddings + inner * int(bits) // 8)
