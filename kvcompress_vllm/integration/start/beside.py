# SPDX-License-Identifier: Apache-2.0
"""What layers that are not compressed will hold, from a model's configuration alone; and how vLLM
makes blocks because of them."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import ModelRegistry

from kvcompress_vllm.integration.sizing import draft_tokens
from kvcompress_vllm.integration.start import attention_kinds as kinds
from kvcompress_vllm.scheduling.local import Local, LocalLayers, State

KERNEL_BLOCK_SIZE = 16
"""Tokens of a page where a block has hundreds; vLLM makes blocks a multiple of it."""


class Beside(NamedTuple):
    """Of one engine.

    Attributes:
        layers: how many a block has room for; at least as many as are compressed.
        block_size: tokens of a block.
        kernel_blocks: of a block.
        others: groups of layers that are not compressed.
    """

    layers: int
    block_size: int
    kernel_blocks: int
    others: LocalLayers


def beside(config: VllmConfig, token_bytes: int) -> Beside:
    """What stands beside the compressed layers of a model, as vLLM will group it.

    Args:
        token_bytes: of a token in one compressed layer of a rank.

    Raises:
        ValueError: vLLM does not say how large a state is.
    """
    size = config.cache_config.block_size or KERNEL_BLOCK_SIZE
    kernel_blocks = 1
    if kinds.has_states(config):
        needed = -(-_state_bytes(config) // (KERNEL_BLOCK_SIZE * token_bytes))
        size = max(size, needed * KERNEL_BLOCK_SIZE)
        kernel_blocks = size // KERNEL_BLOCK_SIZE
    counts = kinds.counted(config)
    layers = kinds.group_size(counts)
    groups: list[Local | State] = []
    for kind, count in counts.items():
        if kind != kinds.COMPRESSED:
            groups += [_local(config, kind, size)] * -(-count // layers)
    others = LocalLayers(groups, size, config.max_in_flight_tokens, draft_tokens(config))
    return Beside(layers, size, kernel_blocks, others)


def _local(config: VllmConfig, kind: str, block_size: int) -> Local | State:
    text: Any = config.model_config.hf_text_config
    if "sliding" in kind:
        return Local(int(text.sliding_window) - 1)
    if "chunked" in kind:
        chunk = int(text.attention_chunk_size)
        return Local(chunk, aligned=chunk % block_size == 0)
    return State()


def _state_bytes(config: VllmConfig) -> int:
    """Bytes of a layer's state on a rank."""
    model = config.model_config
    found: Any = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)[0]
    try:
        shapes = found.get_mamba_state_shape_from_config(config)
        dtypes: tuple[torch.dtype, ...] = found.get_mamba_state_dtype_from_config(config)
    except AttributeError as error:
        raise ValueError(f"vLLM does not say how large a state of {model.model!r} is") from error
    return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True))
