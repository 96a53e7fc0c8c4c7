# SPDX-License-Identifier: Apache-2.0
"""Copies of a request's keys, values and observed queries, one layer at a time.

Letters as in ``cache/layout.py``. For policies that need more of the keys, values or
queries than the channels of the ops tell. A copy is made per call, so that no more than one layer
of a request is held beside the cache: H * seq_len * D elements, 32 MiB for 16,384 tokens of
Llama-3.1-8B in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout, page_format
from kvcompress_vllm.cache.state import PackedState

Reader = Callable[[int], Tensor]


class Packed(NamedTuple):
    """A request that was compressed before: its state slot, and F up to now."""

    state_slot: int
    covered: int


def readers(
    pages: Tensor,
    row: Tensor,
    seq_len: int,
    state: PackedState,
    observe_slot: int,
    num_queries: int,
    packed: Packed | None,
    left_out: int = 0,
) -> tuple[Reader, Reader, Reader]:
    """Functions of a layer: its keys, its values, its observed queries.

    Args:
        pages: ``[P, B, 2 * D]``.
        row: ``[M]`` int32 block ids of a request.
        seq_len: its tokens.
        num_queries: observed queries n, those of the last n positions.
        packed: None: never compressed, so that key j is the one of position j.
        left_out: first columns, which every head begins after.

    Returns:
        Two functions that give ``[H, seq_len - left_out, D]`` and one that gives ``[H, G, n, D]``.
        Heads that kept fewer keys begin with zeros.
    """
    group = state.group
    heads, block_size, head_size = group.heads, group.block_size, group.head_size
    covered, blocks_per_page = packed.covered if packed else 0, group.blocks_per_page

    def read(layer: int, part: slice) -> Tensor:
        column = torch.arange(left_out, seq_len, device=pages.device)
        head = layer * heads + torch.arange(heads, device=pages.device)[:, None]
        num_pages, first_page = (
            table[packed.state_slot, layer][:, None] if packed else torch.zeros_like(head)
            for table in (state.num_pages, state.first_page)
        )
        key = column + (num_pages * blocks_per_page - covered) * block_size
        ids, within = layout.place(
            row, covered, num_pages, first_page, head, group.pages_per_block, key.clamp(min=0),
            block_size, blocks_per_page,
        )  # fmt: skip
        if not packed:
            return pages[ids, within, part]
        # Codes have more places in a page: of packed keys this reads others, which are replaced.
        copied = pages[ids, within % block_size, part]
        if state.page_scales is not None:
            scales = state.page_scales[packed.state_slot, layer]
            codes = page_format.packed_codes(pages, state.page_format)
            behind = key >= num_pages * blocks_per_page * block_size
            # A tail page, as codes, may be asked for its first places only.
            values = page_format.dequantise(codes[ids, within], scales, state.page_format)
            copied = torch.where(behind[..., None], copied, values[..., part].to(copied.dtype))
        return copied.masked_fill_((key < 0)[..., None], 0)

    def queries(layer: int) -> Tensor:
        ring = state.ring
        positions = torch.arange(seq_len - num_queries, seq_len, device=ring.device) % state.window
        observed: Tensor = ring[layer, observe_slot, positions].unflatten(1, (heads, -1))
        return observed.permute(1, 2, 0, 3)

    return (
        lambda layer: read(layer, slice(head_size)),
        lambda layer: read(layer, slice(head_size, None)),
        queries,
    )
