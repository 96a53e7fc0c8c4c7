# SPDX-License-Identifier: Apache-2.0
"""What turns the query of a token into that of its repetition, read off vLLM's rotary modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress_vllm.compression.echo import Rotation
from kvcompress_vllm.integration.worker import transformers_rotary
from kvcompress_vllm.ops.reference import rotated

CLOSE = 0.05
"""How far a rotation may be from what the module itself does, whose table may be in 16 bits."""


def rotations(
    model: nn.Module, layers: Mapping[str, nn.Module], distance: int, device: torch.device
) -> list[Rotation]:
    """The rotation by ``distance`` positions of every attention layer.

    Args:
        model: whose modules own the attention layers.
        layers: vLLM's attention layers by name, in their order.

    Raises:
        ValueError: it cannot be told what a layer's rotary embedding does.
    """
    owners = {
        id(child): module for module in model.modules() for child in module.children()
    }  # the attention block that holds projections, rotary embedding and attention
    if not any("Rotary" in type(module).__name__ for module in model.modules()):
        # Positions, if any, are added to what is embedded: nothing turns.
        return [_rotation(None, distance, device)] * len(layers)
    known: dict[int, Rotation] = {}
    found = []
    for name, layer in layers.items():
        try:
            owner = owners.get(id(layer))
            if transformers_rotary.written_there(owner):
                found.append(transformers_rotary.rotation(model, owner, distance, device))
                continue
            rope = _rotary_of(owner)
            if id(rope) not in known:
                known[id(rope)] = _rotation(rope, distance, device)
        except Exception as error:  # modules of models to come may raise anything
            raise ValueError(
                "kv_compress: policy=echo needs to know how the model rotates queries, and "
                f"{name} does not tell: {error}; name another policy, such as kv_compress"
            ) from error
        found.append(known[id(rope)])
    return found


def _rotary_of(owner: Any) -> Any:
    """The rotary module of an attention block; None: it attends without positions (NoPE)."""
    for name in ("rotary_emb", "rotary_pos_emb"):
        if hasattr(owner, name):
            return getattr(owner, name) if _rotates(owner) else None
    raise ValueError(f"{type(owner).__name__} has no rotary_emb")


_NAMES = ("v1", "apply_rope_all_layers", "force_rope", "is_local_attention")
"""How vLLM's models call it that a layer rotates keys also without a window: Command-R (not A),
Exaone 4, Command-A MoE, AFMoE. Others have none of these."""


def _rotates(owner: Any) -> bool:
    """Whether an attention block with a rotary module uses it."""
    if not getattr(owner, "use_rope", True):
        return False
    known = [getattr(owner, name) for name in _NAMES if hasattr(owner, name)]
    return not known or any(known) or bool(getattr(owner, "sliding_window", None))


def _rotation(rope: Any, distance: int, device: torch.device) -> Rotation:
    if rope is None:
        return Rotation(torch.zeros(0, 2, device=device), False)
    table = _table(rope)
    pairs, last = table.shape[1] // 2, table.shape[0] - 1
    if table.shape[1] != rope.rotary_dim or last < 1:
        raise ValueError(f"its table is {tuple(table.shape)} for {rope.rotary_dim} dimensions")
    waves = torch.complex(table[:, :pairs].double(), table[:, pairs:].double())
    if not waves.abs().allclose(waves[0].abs().expand_as(waves), rtol=1e-3, atol=0):
        raise ValueError("its table does not hold rotations")
    waves = waves / waves.abs()  # without the factor of YaRN and others
    # Beyond the end of a short table, in several turns.
    turns, rest = divmod(distance, last)
    wave = waves[last] ** turns * waves[rest]
    interleaved = not getattr(rope, "is_neox_style", True)
    near = min(distance, last)
    _check(rope, torch.view_as_real(waves[near]).float(), interleaved, near)
    return Rotation(torch.view_as_real(wave).float().contiguous().to(device), interleaved)


def _table(rope: Any) -> Tensor:
    """``[positions, 2 * pairs]`` fp32: cosines, then sines. Not the module's own table, which is in
    the dtype of the model."""
    with torch.device("cpu"):
        if hasattr(rope, "long_short_cos_sin_cache"):
            if rope.use_long_rope:
                count, factor = rope.max_position_embeddings, rope.long_factor
            else:
                count, factor = rope.original_max_position_embeddings, rope.short_factor
            table: Tensor = rope._compute_cos_sin_cache(count, factor, 1.0)
        else:
            table = rope._compute_cos_sin_cache()
    return table.float().cpu()


def _check(rope: Any, angles: Tensor, interleaved: bool, distance: int) -> None:
    """Compare with what the module does to queries at positions 0 and ``distance``.

    Raises:
        ValueError: it does something else.
    """
    buffer = next(rope.buffers())
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, rope.head_size, generator=generator).to(buffer.device, buffer.dtype)
    positions = torch.tensor([0, distance], device=buffer.device)
    apply = getattr(rope, "forward_native", rope.forward)
    turned, _ = apply(positions, query.repeat(2, 1), query.repeat(2, 1))
    first, then = turned.view(2, -1).float().cpu()
    if not rotated(first, angles, interleaved).allclose(then, rtol=0, atol=CLOSE):
        raise ValueError(f"{type(rope).__name__} does more than rotate pairs of dimensions")
