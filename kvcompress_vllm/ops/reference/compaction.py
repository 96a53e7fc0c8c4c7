# SPDX-License-Identifier: Apache-2.0
"""Moving what is kept into the new packed blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout
from kvcompress_vllm.ops.reference.rows import packed_part


def compact_pages(
    pages: Tensor,
    block_table: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    kept_pages: Tensor,
    kept_first: Tensor,
    kept_keys: Tensor,
    new_blocks: Tensor,
) -> None:
    """Copy the kept K/V of each request into its new packed blocks, out of place.

    Page i of request r's packed blocks is page ``i % (L * H)`` of block ``i // (L * H)``; head
    (l, h) gets ``kept_pages`` of them from its exclusive prefix sum within the request on.

    Args:
        pages: ``[P, B, 2 * D]``, changed; new blocks never overlap the old ones of any request. Or
            what else is stored by key, ``[P, B, n]`` of 4 bytes or a multiple of 16 for each.
        block_table, state_slot, ...: the rows and state before this compression.
        kept_pages, kept_first, kept_keys: from :func:`select_pages`.
        new_blocks: ``[R, >= C]`` int32 block ids.
    """
    layers, heads = num_pages.shape[1:]
    slots, block_size = layers * heads, pages.shape[1]
    offset = torch.arange(block_size, device=pages.device)
    for r, slot in enumerate(state_slot.tolist()):
        base = int(kept_first[r, 0, 0])
        for index in range(slots):
            layer, head = divmod(index, heads)
            count, first = int(kept_pages[r, layer, head]), int(kept_first[r, layer, head])
            key = kept_keys[first : first + count].flatten().long()
            packed, old_f = packed_part(slot, num_pages, covered, layer, head)
            old_first = 0 if slot < 0 else int(first_page[slot, layer, head])
            source = layout.page_id(
                block_table[r],
                old_f,
                packed,
                old_first,
                index,
                slots,
                key.div(block_size, rounding_mode="floor"),
            )
            j = torch.arange(count, device=pages.device)
            target = layout.page_id(new_blocks[r], 0, count, first - base, index, slots, j)
            pages[target.repeat_interleave(block_size), offset.repeat(count)] = pages[
                source, key.remainder(block_size)
            ]
