# SPDX-License-Identifier: Apache-2.0
"""Which keys a compression keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.ops.reference.rows import State


def select_pages(
    scores: Tensor,
    page_start: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    page_scales: Tensor | None,
    page_format: int,
    new_covered: Tensor,
    num_freed: Tensor,
    num_recent: Tensor,
    num_sinks: int,
    floor_pages: int,
    num_kept_pages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the keys to keep, whole pages at a time (KV-Compress, arXiv 2410.00161, sec. 4.2.2).

    The candidate keys of a head are sorted ascending by (shielded, score, key). Freeing e pages of
    the head costs the score at rank ``e * T - 1``. In every group of heads the cheapest pages are
    freed, ties by (cost, layer, head, page), until ``num_freed`` are gone. Costs never fall within
    a head, so a head loses its e lowest pages' worth of keys. A NaN score counts as +inf.

    Args:
        scores: ``[pages, B]`` fp32, higher means keep; laid out as the statistics op's output,
            with which it shares ``page_start``. Every head has whole pages of T candidates.
        num_freed: ``[R, A]`` int32, pages to free per group of heads; A divides L * H and group
            ``a`` is the a-th run of ``L * H / A`` heads in (layer, head) order: A = 1 all heads
            compete, A = L the heads of a layer, A = L * H none.
        num_recent: ``[R]`` int32, candidate keys at the end of every head that are shielded.
        num_sinks: candidate keys at the start of every head that are shielded.
        floor_pages: pages that every head keeps; covers the shields:
            ``floor_pages * T >= num_sinks + num_recent``.
        num_kept_pages: pages kept over all requests.

    Returns:
        ``kept_pages`` ``[R, L, H]`` int32, ``kept_first`` ``[R, L, H]`` int32 (exclusive prefix sum
        over all R, L, H), ``kept_keys`` ``[num_kept_pages, T]`` int32: for the kept pages in
        (r, l, h) order, which key of the head fills each place; ascending within a head.

    Raises:
        RuntimeError: ``num_freed`` cannot be met, or does not leave ``num_kept_pages``; a head has
            candidates that are no whole pages.
    """
    layers, heads = num_pages.shape[1:]
    slots, block_size = layers * heads, scores.shape[1]
    state = State(num_pages, first_page, covered, page_scales, page_format)
    page_keys = PageFormat(page_format).keys_per_page(block_size)
    num_requests, groups = num_freed.shape
    kept_pages = torch.zeros(num_requests, layers, heads, dtype=torch.int32, device=scores.device)
    kept_keys: list[Tensor] = []
    flat = torch.nan_to_num(
        scores.flatten(), nan=float("inf"), posinf=float("inf"), neginf=float("-inf")
    )
    rows = zip(
        page_start.tolist(),
        state_slot.tolist(),
        new_covered.tolist(),
        num_recent.tolist(),
        num_freed.tolist(),
        strict=True,
    )
    for r, (start, slot, new_f, recent, freed) in enumerate(rows):
        orders: list[Tensor] = []
        costs: list[list[tuple[float, int, int]]] = [[] for _ in range(groups)]
        counts: list[int] = []
        for index in range(slots):
            layer, head = divmod(index, heads)
            of_head = state.head(page_start, slot, layer, head)
            begin, n = of_head.candidates(start, new_f, block_size)
            if n % page_keys:
                raise RuntimeError(
                    f"select_pages: request {r} has {n} candidates, not whole pages of {page_keys}"
                )
            score = flat[begin : begin + n]
            key = torch.arange(n, device=scores.device)
            shielded = (key < num_sinks) | (key >= n - recent)
            order = score.argsort(stable=True)
            order = order[shielded[order].to(torch.int8).argsort(stable=True)]
            orders.append(order)
            counts.append(n // page_keys)
            evictable = max(0, n // page_keys - floor_pages)
            price = score[order][page_keys - 1 : evictable * page_keys : page_keys]
            costs[index * groups // slots] += [(c, index, e) for e, c in enumerate(price.tolist())]
        lost = [0] * slots
        for group, wanted in zip(costs, freed, strict=True):
            if not 0 <= wanted <= len(group):
                raise RuntimeError(
                    f"select_pages: request {r} is to free {wanted} pages of a group "
                    f"of heads that can free {len(group)}"
                )
            for _, index, _ in sorted(group)[:wanted]:
                lost[index] += 1
        for index, order in enumerate(orders):
            kept_pages[r].view(-1)[index] = counts[index] - lost[index]
            kept_keys.append(order[lost[index] * page_keys :].sort().values)
    keys = torch.cat(kept_keys) if kept_keys else scores.new_empty(0, dtype=torch.int64)
    if keys.numel() != num_kept_pages * page_keys:
        raise RuntimeError(
            f"select_pages: {keys.numel()} keys kept, expected {num_kept_pages} "
            f"pages of {page_keys}"
        )
    flat_kept = kept_pages.flatten()
    kept_first = (flat_kept.cumsum(0) - flat_kept).to(torch.int32).view_as(kept_pages)
    return kept_pages, kept_first, keys.to(torch.int32).view(num_kept_pages, page_keys)


def empty_selection(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`select_pages` returns, by shape."""
    num_pages, page_format, num_freed, num_kept_pages = rest[2], rest[6], rest[8], rest[-1]
    page_keys = PageFormat(page_format).keys_per_page(scores.shape[1])
    heads = scores.new_empty((num_freed.shape[0], *num_pages.shape[1:]), dtype=torch.int32)
    keys = scores.new_empty((num_kept_pages, page_keys), dtype=torch.int32)
    return heads, torch.empty_like(heads), keys
