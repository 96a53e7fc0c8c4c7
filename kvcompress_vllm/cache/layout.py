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
    m  blocks per packed page          F  full blocks covered by compression

One buffer holds all layers, ``[N, L, H, B, 2 * D]`` (K, then V, in the last dimension). Flat, the
same bytes are the pages ``[P, B, 2 * D]``: page ``block_id * L * H + place`` has that place in its
block. In standard placement, place ``l * H + h`` belongs to layer l and head h. A request's
block-table row keeps its logical length:

    index   0 ........ C-1    C ........... F-1    F ............ end
            packed blocks     null block (0)       tail, standard placement

The ``C * L * H`` pages of the packed blocks are dealt to the heads in (layer, head) order: head
(l, h) owns ``num_pages[l, h]`` of them from ``first_page[l, h]`` on. A packed page holds the keys
of m blocks, ``m * B`` of them, in the bytes of B (``page_format.py``; m = 1 where they are stored
as they are), a page of the tail always B; so F is a multiple of m. A request that was never
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
    covered: int | Tensor,
    num_pages: int | Tensor,
    first_page: int | Tensor,
    head: int | Tensor,
    pages_per_block: int,
    j: Tensor,
    start: int | Tensor = 0,
) -> Tensor:
    """Page ids of the pages ``j`` of one head, or of several with tensors that broadcast.

    Args:
        row: ``[M]`` block ids of the request, or of several in one piece.
        covered: F, full blocks covered by compression.
        num_pages: packed pages of this head.
        first_page: first packed page of this head.
        head: ``l * H + h``.
        pages_per_block: ``L * H``.
        j: ``[n]`` int64 indices of the head's pages.
        start: where the request's block ids begin.

    Returns:
        ``[n]`` int64 page ids.
    """
    packed = j < num_pages
    i = first_page + j
    block = i.div(pages_per_block, rounding_mode="floor")
    index = torch.where(packed, block, covered + j - num_pages)
    place = torch.where(packed, i.remainder(pages_per_block), head)
    return row[start + index].long() * pages_per_block + place


def place(
    row: Tensor,
    covered: int,
    num_pages: int | Tensor,
    first_page: int | Tensor,
    head: int | Tensor,
    pages_per_block: int,
    key: Tensor,
    block_size: int,
    blocks_per_page: int = 1,
) -> tuple[Tensor, Tensor]:
    """Where keys of a head are: ``[n]`` int64 page ids, and which key of the page each is.

    Args:
        key: ``[n]`` int64 indices of the head's keys; the others as for :func:`page_id`.
        blocks_per_page: m.
    """
    page_keys = blocks_per_page * block_size
    packed_keys = num_pages * page_keys
    packed, behind = key < packed_keys, key - packed_keys
    j = torch.where(
        packed,
        key.div(page_keys, rounding_mode="floor"),
        num_pages + behind.div(block_size, rounding_mode="floor"),
    )
    within = torch.where(packed, key.remainder(page_keys), behind.remainder(block_size))
    return page_id(row, covered, num_pages, first_page, head, pages_per_block, j), within


def first_candidate(first_page: Index, head: Index, fresh: int, blocks_per_page: int = 1) -> Index:
    """Index of a head's first candidates among those of its request, in units of B keys.

    Candidates are a head's packed pages (p), m units each, then the full pages of its tail (t),
    ``fresh`` of them, head after head in (layer, head) order; with m = 1::

        head          0            1        2
        candidates    p p p t t    p t t    p p t t
        first at      0            3 + 2    4 + 4       first_page * m + head * fresh
    """
    return first_page * blocks_per_page + head * fresh


def num_keys(
    seq_len: int, covered: int, num_pages: int, block_size: int, blocks_per_page: int = 1
) -> int:
    """K/V vectors that a head holds for a request of ``seq_len`` tokens."""
    return (num_pages * blocks_per_page - covered) * block_size + seq_len


def exclusive_cumsum(num_pages: Tensor) -> Tensor:
    """``first_page`` of every head: ``[..., L, H]`` int32, summed over (layer, head) in order."""
    flat = num_pages.flatten(-2)
    return (flat.cumsum(-1) - flat).to(torch.int32).view_as(num_pages)
