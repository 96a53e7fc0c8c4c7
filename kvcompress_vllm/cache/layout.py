# SPDX-License-Identifier: Apache-2.0
"""The page arithmetic of the KV cache, in Python (the twin of ``csrc/paged_layout.h``).

Nothing else in the Python package computes a page id. Shape letters, used in every tensor file:

    N  blocks in the pool              L  layers on this rank
    B  tokens per block and page       H  KV heads on this rank
    P  pages, N * L * H                G  query heads per KV head
    R  requests (rows) in a batch      D  head size
    M  blocks in a row                 T  tokens in a batch
    U  state slots (packed requests)   W  observed queries per request
    O  observation slots               C  packed blocks of a request
                                       F  full blocks covered by compression

One buffer holds all layers, ``[N, L, H, B, 2 * D]`` (K, then V, in the last dimension). Flat, the
same bytes are the pages ``[P, B, 2 * D]``: page ``block_id * L * H + place`` has that place in its
block. In standard placement, place ``l * H + h`` belongs to layer l and head h. A request's
block-table row keeps its logical length:

    index   0 ........ C-1    C ........... F-1    F ............ end
            packed blocks     null block (0)       tail, standard placement

The ``C * L * H`` pages of the packed blocks are dealt to the heads in (layer, head) order: head
(l, h) owns ``num_pages[l, h]`` of them from ``first_page[l, h]`` on. A request that was never
compressed has ``C = F = 0``, so the same formulas describe it.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

NOT_PACKED = -1
"""Value of ``owner`` and ``state_slot`` where there is no packed request."""


Index = TypeVar("Index", int, Tensor)


def page_id(
    row: Tensor,
    covered: int,
    num_pages: int | Tensor,
    first_page: int | Tensor,
    head: int | Tensor,
    pages_per_block: int,
    j: Tensor,
) -> Tensor:
    """Page ids of the pages ``j`` of one head, or of several with tensors that broadcast.

    Args:
        row: ``[M]`` block ids of the request.
        covered: F, full blocks covered by compression.
        num_pages: packed pages of this head.
        first_page: first packed page of this head.
        head: ``l * H + h``.
        pages_per_block: ``L * H``.
        j: ``[n]`` int64 indices of the head's pages.

    Returns:
        ``[n]`` int64 page ids.
    """
    packed = j < num_pages
    i = first_page + j
    block = i.div(pages_per_block, rounding_mode="floor")
    index = torch.where(packed, block, covered + j - num_pages)
    place = torch.where(packed, i.remainder(pages_per_block), head)
    return row.long()[index] * pages_per_block + place


def first_candidate(first_page: Index, head: Index, fresh: int) -> Index:
    """Index of a head's first candidate page among those of its request.

    Candidates are a head's packed pages (p), then the full pages of its tail (t), ``fresh`` of
    them, head after head in (layer, head) order::

        head          0            1        2
        candidates    p p p t t    p t t    p p t t
        first at      0            3 + 2    4 + 4       first_page + head * fresh
    """
    return first_page + head * fresh


def num_keys(seq_len: int, covered: int, num_pages: int, block_size: int) -> int:
    """K/V vectors that a head holds for a request of ``seq_len`` tokens."""
    return num_pages * block_size + seq_len - covered * block_size


def exclusive_cumsum(num_pages: Tensor) -> Tensor:
    """``first_page`` of every head: ``[..., L, H]`` int32, summed over (layer, head) in order."""
    flat = num_pages.flatten(-2)
    return (flat.cumsum(-1) - flat).to(torch.int32).view_as(num_pages)
