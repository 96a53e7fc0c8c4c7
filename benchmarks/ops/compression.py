# SPDX-License-Identifier: Apache-2.0
"""Compression of whole prompts: statistics, selection, compaction."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.batch import BLOCK_SIZE, GROUP, HEAD_SIZE, HEADS, SCALE, random_pages
from benchmarks.ops.timing import Report, seconds
from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat

# Requests, tokens each, observed queries, ratio.
COMPRESSIONS = (
    (1, 1000, 8, 2),
    (1, 6000, 8, 4),
    (1, 6000, 32, 4),
    (4, 2000, 8, 8),
    (1, 60000, 8, 8),
)


def bench_compression(report: Report, device: torch.device) -> None:
    for case in COMPRESSIONS:
        torch.cuda.empty_cache()
        _compression(report, device, *case)


def bench_quantisation(report: Report, device: torch.device) -> None:
    """The two passes of a compaction into codes, of an uncompressed prompt at ratio 4."""
    for page_format in PageFormat:
        for tokens in (6000, 60000):
            torch.cuda.empty_cache()
            _quantisation(report, device, page_format, tokens)


def _quantisation(
    report: Report, device: torch.device, page_format: PageFormat, tokens: int, layers: int = 32
) -> None:
    slots, page_keys = layers * HEADS, page_format.keys_per_page(BLOCK_SIZE)
    full = tokens // page_keys * page_format.blocks_per_page
    kept = -(-full // 4)
    pages = random_pages((1 + full + kept) * slots, device)
    order = (torch.randperm(full + kept) + 1).int().to(device)
    table, new_blocks = order[:full].view(1, -1), order[full:].view(1, -1)
    unused = torch.zeros(1, layers, HEADS, dtype=torch.int32, device=device)
    scales = page_format.new_scales(1, layers, HEADS, HEAD_SIZE, device)
    slot = torch.full((1,), -1, dtype=torch.int32, device=device)
    state = (slot, unused, unused, unused[:, 0, 0].contiguous(), scales, int(page_format))
    candidates = full * BLOCK_SIZE
    count = min(kept, candidates // page_keys)
    picked = torch.rand(slots, candidates, device=device).argsort(-1)[:, : count * page_keys]
    keys = picked.sort(-1).values.int().view(-1, page_keys)
    kept_pages = torch.full_like(unused, count)
    first = torch.arange(slots, dtype=torch.int32, device=device).view_as(unused) * count
    before = (pages, table, *state, kept_pages, first, keys)
    name = f"{tokens} tokens, {page_format.label}, {count * page_keys} keys of a head"
    moved = 4 * HEAD_SIZE * keys.numel()
    if scales is None:
        step = partial(ops.compact_pages, *before, new_blocks, None)
        report.add("compaction", name, seconds([step]), 2 * moved)
        return
    fit = partial(ops.fit_scales, *before)
    fitted = fit()
    quantise = partial(ops.compact_pages, *before, new_blocks, fitted)
    report.add("fit_scales", name, seconds([fit]), moved)
    written = page_format.key_bytes(HEAD_SIZE) * keys.numel()
    report.add("compact_pages", name, seconds([quantise]), moved + written)
    report.add("compaction", name, seconds([fit, quantise]) * 2, 2 * moved + written)


def _compression(
    report: Report,
    device: torch.device,
    requests: int,
    tokens: int,
    window: int,
    ratio: int,
    layers: int = 32,
) -> None:
    """The three ops that compress uncompressed prompts, alone and one after another."""
    slots = layers * HEADS
    full = tokens // BLOCK_SIZE
    kept = -(-full // ratio)
    total = 1 + requests * (full + 1 + kept)
    pages = random_pages(total * slots, device)
    order = (torch.randperm(total - 1) + 1).int().to(device)
    old_blocks, new_blocks = order.split([requests * (full + 1), requests * kept])
    block_table, new_blocks = old_blocks.view(requests, -1), new_blocks.view(requests, -1)

    def each(value: int) -> Tensor:
        return torch.full((requests,), value, dtype=torch.int32, device=device)

    unused = torch.zeros(2, layers, HEADS, dtype=torch.int32, device=device)
    state = (each(-1), unused, unused, unused[:, 0, 0].contiguous(), None, 0)
    shape = (layers, requests, window, HEADS * GROUP, HEAD_SIZE)
    ring = torch.randn(shape, device=device).mul(2).bfloat16()
    observe_slot = torch.arange(requests, dtype=torch.int32, device=device)
    page_start = torch.arange(requests, device=device) * full * slots
    candidates, pages_out = requests * full * slots, requests * kept * slots
    freed = each((full - kept) * slots).view(-1, 1)

    statistics = partial(
        ops.attention_statistics,
        ring,
        pages,
        block_table,
        each(tokens),
        *state,
        observe_slot,
        each(window),
        each(full),
        page_start,
        candidates,
        ops.channel_mask([ops.SUM_SQUARES]),
        1,
        SCALE,
    )
    keys_alone = partial(
        ops.key_statistics,
        pages,
        block_table,
        each(tokens),
        *state,
        each(full),
        page_start,
        candidates,
        ops.channel_mask([ops.LIKENESS]),
    )
    scores = statistics()[0].clone()
    sinks, floor = 4, -(-(4 + window) // BLOCK_SIZE)
    select = partial(
        ops.select_pages,
        scores,
        page_start,
        *state,
        each(full),
        freed,
        each(window),
        sinks,
        floor,
        pages_out,
    )
    compact = partial(ops.compact_pages, pages, block_table, *state, *select(), new_blocks, None)
    name = f"{requests} x {tokens} tokens, window {window}, ratio {ratio}"
    keys, kept_keys = candidates * BLOCK_SIZE, pages_out * BLOCK_SIZE
    # Two passes over the keys; the scores once; keys and values in and out.
    times = [seconds([step]) for step in (statistics, keys_alone, select, compact)]
    report.add("attention_statistics", name, times[0], 2 * keys * 2 * HEAD_SIZE)
    report.add("key_statistics", name, times[1], 2 * keys * 2 * HEAD_SIZE)
    report.add("select_pages", name, times[2], 4 * (keys + kept_keys))
    report.add("compact_pages", name, times[3], 2 * kept_keys * 4 * HEAD_SIZE)
    report.add("compression", name, seconds([lambda: (statistics(), select(), compact())]))
