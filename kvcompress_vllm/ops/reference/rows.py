# SPDX-License-Identifier: Apache-2.0
"""Where the keys of one (request, layer, head) are. Letters as in ``cache/layout.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout


def packed_part(
    slot: int, num_pages: Tensor, covered: Tensor, layer: int, head: int
) -> tuple[int, int]:
    """Packed pages of a head, and F."""
    return (0, 0) if slot < 0 else (int(num_pages[slot, layer, head]), int(covered[slot]))


def candidates_of(
    start: int,
    slot: int,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    new_covered: int,
    layer: int,
    head: int,
    block_size: int,
) -> tuple[int, int]:
    """Where the output for a head's candidate keys begins, and how many they are."""
    packed, old_f = packed_part(slot, num_pages, covered, layer, head)
    first = 0 if slot < 0 else int(first_page[slot, layer, head])
    fresh = new_covered - old_f
    page = start + layout.first_candidate(first, layer * num_pages.shape[2] + head, fresh)
    return page * block_size, (packed + fresh) * block_size


def keys_of(
    pages: Tensor,
    row: Tensor,
    seq_len: int,
    slot: int,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    layer: int,
    head: int,
) -> Tensor:
    """``[n, 2 * D]``: K and V of everything the head holds, packed pages first."""
    layers, heads = num_pages.shape[1:]
    packed, old_f = packed_part(slot, num_pages, covered, layer, head)
    first = 0 if slot < 0 else int(first_page[slot, layer, head])
    n = layout.num_keys(seq_len, old_f, packed, pages.shape[1])
    j = torch.arange(-(-n // pages.shape[1]), device=pages.device)
    ids = layout.page_id(row, old_f, packed, first, layer * heads + head, layers * heads, j)
    return pages[ids].flatten(0, 1)[:n]


def hidden_keys(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """``[num_queries, num_keys]`` bool: True where causality hides the key; ends aligned."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.triu(num_keys - num_queries + 1)
