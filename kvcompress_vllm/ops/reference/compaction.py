# SPDX-License-Identifier: Apache-2.0
"""Moving what is kept into the new packed blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvcompress_vllm.cache import fitting, layout
from kvcompress_vllm.cache import page_format as formats
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.ops.reference.rows import Head, State


def fit_scales(
    pages: Tensor,
    block_table: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    page_scales: Tensor | None,
    page_format: int,
    kept_pages: Tensor,
    kept_first: Tensor,
    kept_keys: Tensor,
) -> Tensor:
    """Scales with which the kept K/V of each head will be stored: the first pass of a compaction.

    A head that keeps none of its packed keys gets scales that fit what it keeps
    (:func:`fitting.fit`); one that keeps some goes on with the scales it has, widened for the
    others where need be (:func:`fitting.widen`).

    Args:
        pages: ``[P, B, 2 * D]``.
        block_table, state_slot, ...: the rows and state before this compression.
        kept_pages, kept_first, kept_keys: from :func:`select_pages`.

    Returns:
        ``[R, L, H, A, S]`` bf16, zeros of heads that keep nothing.

    Raises:
        RuntimeError: pages of this format have no scales.
    """
    format_ = PageFormat(page_format)
    if format_ is PageFormat.AUTO:
        raise RuntimeError("fit_scales: page_format auto has no scales")
    state = State(num_pages, first_page, covered, page_scales, page_format)
    shape = (*kept_pages.shape, *format_.scales_shape(pages.shape[2] // 2))
    result = torch.zeros(shape, dtype=formats.SCALE_DTYPE, device=pages.device)
    for r, head, _, key in _kept(state, block_table, state_slot, kept_pages, kept_first, kept_keys):
        if not len(key):
            continue
        scales = result[r].flatten(0, 1)[head.slot]
        packed = head.packed * kept_keys.shape[1]
        fresh = head.read(pages, key[key >= packed], stored=True)
        if head.scales is None or int(key[0]) >= packed:
            scales.copy_(fitting.fit(fresh, page_format))
        elif not len(fresh):
            scales.copy_(head.scales)
        else:
            scales.copy_(fitting.widen(head.scales, fresh, len(key) - len(fresh), page_format))
    return result


def empty_scales(pages: Tensor, *rest: Any) -> Tensor:
    """What :func:`fit_scales` returns, by shape."""
    page_format, kept_pages = rest[6], rest[7]
    scales = PageFormat(page_format).scales_shape(pages.shape[2] // 2)
    return pages.new_empty((*kept_pages.shape, *scales), dtype=formats.SCALE_DTYPE)


def compact_pages(
    pages: Tensor,
    block_table: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    page_scales: Tensor | None,
    page_format: int,
    kept_pages: Tensor,
    kept_first: Tensor,
    kept_keys: Tensor,
    new_blocks: Tensor,
    new_scales: Tensor | None,
) -> None:
    """Copy the kept K/V of each request into its new packed blocks, out of place.

    Page i of request r's packed blocks is page ``i % (L * H)`` of block ``i // (L * H)``; head
    (l, h) gets ``kept_pages`` of them from its exclusive prefix sum within the request on.

    Args:
        pages: ``[P, B, 2 * D]``, changed; new blocks never overlap the old ones of any request. Or,
            without ``new_scales``, what else is stored by key, ``[P, T, n]`` of 4 bytes or a
            multiple of 16 for each: tail pages have keys in the first B of T places.
        block_table, state_slot, ...: the rows and state before this compression.
        kept_pages, kept_first, kept_keys: from :func:`select_pages`.
        new_blocks: ``[R, >= C]`` int32 block ids.
        new_scales: ``[R, L, H, A, S]`` bf16 from :func:`fit_scales`: K and V are stored as codes.
    """
    state = State(num_pages, first_page, covered, page_scales, page_format)
    format_ = PageFormat(page_format)
    page_keys = kept_keys.shape[1]
    block_size = page_keys // format_.blocks_per_page
    stored = pages.shape[1]
    if stored != (page_keys if new_scales is None else block_size):
        raise RuntimeError(
            f"compact_pages: pages of {stored} keys cannot hold the {page_keys} of kept_keys"
        )
    rows = zip(
        _kept(state, block_table, state_slot, kept_pages, kept_first, kept_keys),
        kept_first.flatten().tolist(),
        strict=True,
    )
    for (r, head, count, key), first in rows:
        base = int(kept_first[r, 0, 0])
        j = torch.arange(count, device=pages.device)
        target = layout.page_id(new_blocks[r], 0, count, first - base, head.slot, head.slots, j)
        if new_scales is None:
            kept = pages[head.place(key, block_size)]
            pages[target] = kept.view(count, page_keys, pages.shape[2])
        else:
            scales = new_scales[r].flatten(0, 1)[head.slot]
            codes = formats.quantise(head.read(pages, key, stored=True), scales, page_format)
            formats.packed_codes(pages, format_)[target] = codes.view(
                count, page_keys, codes.shape[1]
            )


def _kept(
    state: State,
    block_table: Tensor,
    state_slot: Tensor,
    kept_pages: Tensor,
    kept_first: Tensor,
    kept_keys: Tensor,
) -> Iterator[tuple[int, Head, int, Tensor]]:
    """By request and head: the request, the head, its kept pages and kept keys."""
    heads = kept_pages.shape[2]
    for r, slot in enumerate(state_slot.tolist()):
        for index, (count, first) in enumerate(
            zip(kept_pages[r].flatten().tolist(), kept_first[r].flatten().tolist(), strict=True)
        ):
            key = kept_keys[first : first + count].flatten().long()
            yield r, state.head(block_table[r], slot, *divmod(index, heads)), count, key
