# SPDX-License-Identifier: Apache-2.0
"""The rotation of echo scores against vLLM's rotary modules themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from kvcompress_vllm.integration.worker.rotary import rotations
from kvcompress_vllm.ops.reference import rotated

LONG = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
ROPES = {
    "plain": {},
    "interleaved": {"is_neox_style": False},
    "partial": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024,
        }
    },
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    "short table": {"max_position": 200},
    "mrope": {"rope_parameters": {"mrope_section": [4, 6, 6]}},
}  # fmt: skip
D = 32


class Block(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.attn = nn.Identity()
        for name, value in attributes.items():
            setattr(self, name, value)


def rope_of(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    options = {"max_position": 2048, "is_neox_style": True, "rope_parameters": {}} | ROPES[name]
    parameters = {"rope_theta": 10000.0, "rope_type": "default"} | options.pop("rope_parameters")
    with set_current_vllm_config(VllmConfig()):
        return get_rope(D, rope_parameters=parameters, dtype=dtype, **options)


def rotation_of(block: nn.Module, distance: int = 256, *others: nn.Module):
    (found,) = rotations(
        nn.Sequential(block, *others), {"layers.0.attn": block.attn}, distance, torch.device("cpu")
    )
    return found


@pytest.mark.parametrize("name", ROPES)
def test_a_rotated_query_is_that_of_a_later_token(name):
    rope = rope_of(name)
    angles, interleaved = rotation_of(Block(rotary_emb=rope), 150)
    torch.testing.assert_close(angles.square().sum(-1), torch.ones(len(angles)))
    query = torch.randn(4, 2 * D)
    positions = torch.arange(7, 47, 10)

    def turned(at):
        return rope.forward_native(at, query.clone(), query.clone())[0].view(4, 2, D)

    later = rotated(turned(positions), angles, interleaved)
    torch.testing.assert_close(later, turned(positions + 150), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["v1", "apply_rope_all_layers", "force_rope"])
def test_layers_that_rotate_only_with_a_window(name):
    """Those with full attention have the module, and do not call it."""
    rope = rope_of("plain")
    for flag, window, pairs in ((False, None, 0), (True, None, 16), (False, 512, 16)):
        block = Block(rotary_emb=rope, sliding_window=window, **{name: flag})
        assert len(rotation_of(block)[0]) == pairs


def test_a_distance_beyond_the_table_and_a_table_in_16_bits():
    far, _ = rotation_of(Block(rotary_emb=rope_of("short table", torch.bfloat16)), 512)
    known, _ = rotation_of(Block(rotary_emb=rope_of("plain")), 512)
    torch.testing.assert_close(far, known, rtol=1e-4, atol=1e-4)


def test_layers_without_positions_do_not_rotate():
    for block in (
        Block(rotary_emb=None),
        Block(rotary_emb=rope_of("plain"), use_rope=False),
        Block(),  # of a model that rotates nowhere, such as GPT-2
    ):
        assert rotation_of(block).angles.shape == (0, 2)


@pytest.mark.parametrize("broken", ["absent", "scaled", "other pairs"])
def test_what_does_not_tell_is_refused_by_name(broken):
    rope = rope_of("plain")
    if broken == "scaled":
        stock = rope._compute_cos_sin_cache
        rope._compute_cos_sin_cache = lambda: stock() * torch.linspace(1, 2, 2048)[:, None]
    if broken == "other pairs":
        rope.is_neox_style = False
        rope.forward_native = rope_of("plain").forward_native
        rope = _Foreign(rope)
    block = Block() if broken == "absent" else Block(rotary_emb=rope)
    with pytest.raises(ValueError, match=r"policy=echo .* layers\.0\.attn"):
        rotation_of(block, 256, rope_of("plain"))


class _Foreign(nn.Module):
    """Says one thing and does another."""

    def __init__(self, rope):
        super().__init__()
        self.rope = rope
        self.is_neox_style, self.rotary_dim, self.head_size = False, rope.rotary_dim, D
        self._compute_cos_sin_cache = rope._compute_cos_sin_cache

    def forward(self, positions, query, key):
        return self.rope.forward_static(positions, query, key, D, D, self.rope.cos_sin_cache, True)
