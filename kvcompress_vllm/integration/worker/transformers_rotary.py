# SPDX-License-Identifier: Apache-2.0
"""The rotation of models that vLLM runs as ``transformers`` wrote them.

There one module computes sines and cosines for all layers, and every attention block turns its
queries with a function of its file. What that function does is tried out; whether a block calls it
is read in its source, for nothing else tells.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import nn

from kvcompress_vllm.compression.echo import Rotation
from kvcompress_vllm.ops.reference import rotated

CLOSE = 1e-3
"""How far a rotation may be from what the block's function does in fp32."""
_APPLY = "apply_rotary_pos_emb"
_CHANGING = ("dynamic", "longrope")
"""Kinds whose angles depend on how long a text is."""


def written_there(owner: Any) -> bool:
    """Whether an attention block is one of ``transformers``."""
    return type(owner).__module__.startswith("transformers.")


def rotation(model: nn.Module, owner: Any, distance: int, device: torch.device) -> Rotation:
    """The rotation of an attention block by ``distance`` positions.

    Raises:
        ValueError: it cannot be told.
    """
    if not _turns(owner):
        return Rotation(torch.zeros(0, 2, device=device), False)
    rope = _rope_of(model, owner)
    positions = torch.tensor([[0, distance]], device=next(rope.buffers()).device)
    more = _layer_type(rope, owner)
    with torch.no_grad():
        cos, sin = rope(torch.zeros(1, 2, 1, device=positions.device), positions, **more)
        if cos.shape[:2] != (1, 2):
            raise ValueError(f"{type(rope).__name__} takes positions of several dimensions")
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(1, 1, 1, cos.shape[-1], generator=generator).to(cos)
        query = query.expand(1, 1, 2, -1)
        apply = getattr(sys.modules[type(owner).__module__], _APPLY)
        turned, _ = apply(query, query, cos, sin)
    first, then = turned[0, 0].float().cpu()
    waves = torch.complex(cos[0, 1].double().cpu(), sin[0, 1].double().cpu())
    waves = waves / waves.abs()
    # Each angle stands there twice: one half after the other, or side by side.
    for one_each in (waves[: len(waves) // 2], waves[::2]):
        angles = torch.view_as_real(one_each).float().contiguous()
        for interleaved in (False, True):
            if rotated(first, angles, interleaved).allclose(then, rtol=0, atol=CLOSE):
                return Rotation(angles.to(device), interleaved)
    raise ValueError(f"{type(owner).__name__} does more than rotate pairs of dimensions")


def _turns(owner: Any) -> bool:
    """Whether a block turns its queries, as the last that it does to them.

    Raises:
        ValueError: its source does not say so plainly.
    """
    source = textwrap.dedent(inspect.getsource(type(owner).forward))
    statements = _statements(ast.parse(source), ())
    calls = [
        (above, node)
        for above, node in statements
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) == _APPLY
    ]
    if len(calls) != 1:
        raise ValueError(f"{type(owner).__name__} calls {_APPLY} {len(calls)} times")
    [(above, call)] = calls
    query = ast.unparse(call.targets[0]).strip("()").partition(",")[0]
    for _, node in statements:
        if isinstance(node, ast.Assign) and node.lineno > call.lineno:
            norms = "norm" in ast.unparse(node.value).lower()
            if norms and query in ast.unparse(node.targets[0]):
                raise ValueError(f"{type(owner).__name__} changes queries once they are turned")
    for condition in above:
        if condition != "self.use_rope":
            raise ValueError(f"{type(owner).__name__} turns queries if {condition}")
        if not owner.use_rope:
            return False
    return True


def _statements(node: ast.AST, above: tuple[str, ...]) -> list[tuple[tuple[str, ...], ast.stmt]]:
    """All statements, each with the conditions that it is under."""
    found: list[tuple[tuple[str, ...], ast.stmt]] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt):
            continue
        found.append((above, child))
        inner = above
        if isinstance(child, ast.If):
            inner = (*above, ast.unparse(child.test))
        found += _statements(child, inner)
    return found


def _rope_of(model: nn.Module, owner: Any) -> Any:
    """The module that computes a block's sines and cosines."""
    ropes = [
        module
        for module in model.modules()
        if "Rotary" in type(module).__name__ and type(module).__module__ == type(owner).__module__
    ]
    if len(ropes) != 1:
        raise ValueError(f"{type(owner).__name__} has {len(ropes)} rotary modules beside it")
    [rope] = ropes
    kinds = getattr(rope, "rope_type", "default")
    own = kinds.values() if isinstance(kinds, dict) else [kinds]
    for kind in own:
        if kind in _CHANGING:
            raise ValueError(f"angles of rope_type={kind!r} depend on how long a text is")
    return rope


def _layer_type(rope: Any, owner: Any) -> dict[str, str]:
    """The argument that says which of several angles a block takes, where there are several."""
    if "layer_type" not in inspect.signature(inspect.unwrap(rope.forward)).parameters:
        return {}
    return {"layer_type": rope.config.layer_types[owner.layer_idx]}
