# SPDX-License-Identifier: Apache-2.0
"""Copies of a request's keys, values and observed queries, one layer at a time.

Letters as in ``kvcompress_vllm/layout.py``. For policies that score keys by what they are instead
of what attention they got. A copy is made per call, so that no more than one layer of a request is
held beside the cache: H * seq_len * D elements, 32 MiB for 16,384 tokens of Llama-3.1-8B in 16
bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress_vllm import layout

Reader = Callable[[int], Tensor]


def readers(
    pages: Tensor,
    row: Tensor,
    seq_len: int,
    heads: int,
    ring: Tensor,
    observe_slot: int,
    num_queries: int,
) -> tuple[Reader, Reader, Reader]:
    """Functions of a layer: its keys, its values, its observed queries.

    Args:
        pages: ``[P, B, 2 * D]``.
        row: ``[M]`` int32 block ids of a request that was never compressed.
        seq_len: its tokens with K/V in the cache.
        heads: H.
        ring: ``[L, O, W, H * G, D]``.
        num_queries: observed queries n, those of the last n positions.

    Returns:
        Two functions that give ``[H, seq_len, D]`` and one that gives ``[H, G, n, D]``.
    """
    block_size, head_size = pages.shape[1], pages.shape[2] // 2
    slots = ring.shape[0] * heads
    blocks = torch.arange(-(-seq_len // block_size), device=pages.device)

    def read(layer: int, part: Tensor) -> Tensor:
        ids = torch.stack([
            layout.page_id(row, 0, 0, 0, layer * heads + head, slots, blocks)
            for head in range(heads)
        ])  # fmt: skip
        return part[ids].flatten(1, 2)[:, :seq_len]

    def queries(layer: int) -> Tensor:
        window = ring.shape[2]
        positions = torch.arange(seq_len - num_queries, seq_len, device=ring.device) % window
        observed: Tensor = ring[layer, observe_slot, positions].unflatten(1, (heads, -1))
        return observed.permute(1, 2, 0, 3)

    return (
        lambda layer: read(layer, pages[..., :head_size]),
        lambda layer: read(layer, pages[..., head_size:]),
        queries,
    )
