# SPDX-License-Identifier: Apache-2.0
"""The rotation of echo scores against what attention blocks of ``transformers`` do themselves."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from kvcompress_vllm.integration.worker.rotary import rotations
from kvcompress_vllm.ops.reference import rotated
from tests.integration.simulation import MODEL

SMALL = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "halves": ("Llama", {}),
    "side by side": ("Glm", {"head_dim": 32, "partial_rotary_factor": 0.5, "pad_token_id": 0}),
    "partial": ("Phi", {"partial_rotary_factor": 0.5}),
    "scaled": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                             "original_max_position_embeddings": 1024}},
    ),
    "by kind of layer": (
        "Olmo3",
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64},
    ),
}  # fmt: skip
DISTANCE = 256


def model_of(name: str, changes: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    torch.manual_seed(0)
    # An engine that ran such a model in this process has left its decorator on the class.
    any_model = EngineArgs(str(MODEL), enforce_eager=True).create_engine_config()
    with set_current_vllm_config(any_model):
        return transformers.AutoModel.from_config(config).eval()


def found_in(model: Any) -> list[Any]:
    """As vLLM builds it, with its attention inside of theirs."""
    layers: dict[str, nn.Module] = {}
    for index, layer in enumerate(model.layers):
        layer.self_attn.attn = nn.Identity()
        layers[f"layers.{index}.self_attn.attn"] = layer.self_attn.attn
    return rotations(model, layers, DISTANCE, torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_repetition_is_turned_as_the_block_turns_it(kind: str) -> None:
    name, changes = KINDS[kind]
    model = model_of(name, changes)
    code = importlib.import_module(type(model).__module__)
    for layer, (angles, interleaved) in zip(model.layers, found_in(model), strict=True):
        more = {}
        if name == "Olmo3":
            more = {"layer_type": model.config.layer_types[layer.self_attn.layer_idx]}
        positions = torch.tensor([[7, 7 + DISTANCE]])
        cos, sin = model.rotary_emb(torch.zeros(1, 2, 64), positions, **more)
        query = torch.randn(cos.shape[-1]).expand(1, 1, 2, -1)
        turned, _ = code.apply_rotary_pos_emb(query, query, cos, sin)
        first, then = turned[0, 0]
        assert angles.shape[0] == cos.shape[-1] // 2
        assert torch.allclose(rotated(first, angles, interleaved), then, atol=1e-4)


def test_layers_without_positions() -> None:
    model = model_of("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0})
    with_positions, without = found_in(model)
    assert with_positions.angles.shape == (16, 2) and without.angles.shape == (0, 2)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Cohere2", {"layer_types": ["sliding_attention", "full_attention"]}, "turns queries if"),
        ("HunYuanDenseV1", {"head_dim": 32}, "changes queries once they are turned"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            "depend on how long a text is",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"policy=echo needs to know how .* {reason}"):
        found_in(model_of(name, changes))
