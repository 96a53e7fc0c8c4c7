# SPDX-License-Identifier: Apache-2.0
"""What is timed: bf16, 8 KV heads of 128 with 4 query heads each, blocks of 16 tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.decode import (
    BLOCK_SIZE,
    GROUP,
    HEAD_SIZE,
    HEADS,
    SCALE,
    Decode,
    compare_flash,
    load_flash,
    random_pages,
)
from benchmarks.ops.timing import Table, seconds
from kvcompress_vllm import ops

# Requests, mean keys per head, spread of their logarithm.
DECODES = (
    *((requests, 96, 1) for requests in (64, 256, 1024)),
    *((requests, 750, 1) for requests in (64, 256, 1024)),
    *((64, mean, 0) for mean in (96, 750, 6000)),
    (64, 6000, 1),
    (256, 3000, 1),
    (1, 6000, 1),
    (8, 1500, 1),
    (16, 30000, 1),
)
# Requests, tokens each, observed queries, ratio.
COMPRESSIONS = (
    (1, 1000, 8, 2),
    (1, 6000, 8, 4),
    (1, 6000, 32, 4),
    (4, 2000, 8, 8),
    (1, 60000, 8, 8),
)


def bench_copies(table: Table, device: torch.device) -> None:
    tokens, blocks, layers = 8192, 2048, 4
    width = HEADS * HEAD_SIZE
    cache = random_pages(blocks * layers * HEADS, device)
    cache = cache.view(blocks, layers, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=device)[:tokens]
    index = torch.arange(tokens, device=device, dtype=torch.int32)
    ring = torch.zeros(layers, tokens, HEADS * GROUP, HEAD_SIZE, device=device).bfloat16()
    writes, observations = [], []
    for layer in range(layers):
        fused = torch.randn(tokens, (GROUP + 2) * width, device=device).bfloat16()
        query, key, value = (
            part.unflatten(1, (-1, HEAD_SIZE))
            for part in fused.split([GROUP * width, width, width], dim=1)
        )
        writes.append(partial(ops.write_kv, key, value, cache[:, layer], slots))
        observations.append(partial(ops.observe_queries, query, index, ring[layer]))
    case = f"{tokens} tokens"
    table.add("write_kv", case, seconds(writes), 8 * tokens * width)
    table.add("observe_queries", case, seconds(observations), 4 * tokens * GROUP * width)


def bench_decode(table: Table, device: torch.device) -> None:
    flash = load_flash()
    for requests, mean, sigma in DECODES:
        torch.cuda.empty_cache()
        case = Decode(requests, mean, sigma, device)
        time = seconds(case.steps())
        note = "" if flash is None else compare_flash(case, flash)
        name = f"decode {requests} x {mean} keys, sigma {sigma}"
        table.add("paged_attention", name, time, case.bytes, note)
        del case


def bench_prefill(table: Table, device: torch.device) -> None:
    """One request prefills a chunk beside one that decodes."""
    chunk = 2048
    case = Decode(2, 6000, 1, device)
    query = torch.randn(chunk + 1, HEADS * GROUP, HEAD_SIZE, device=device).bfloat16()
    start = torch.tensor([0, chunk, chunk + 1], dtype=torch.int32, device=device)
    step = partial(
        ops.paged_attention,
        query,
        case.pages,
        *case.rows,
        start,
        0,
        SCALE,
        torch.empty_like(query),
    )
    time = seconds([step])
    keys = int(case.keys[0, 0].sum())
    flops = 4 * HEAD_SIZE * GROUP * chunk * (keys - HEADS * chunk / 2)
    name = f"prefill {chunk} tokens over {keys // HEADS} keys"
    table.add("paged_attention", name, time, note=f"{flops / time / 1e12:.0f} TFLOP/s")


def bench_compression(table: Table, device: torch.device) -> None:
    for case in COMPRESSIONS:
        torch.cuda.empty_cache()
        _compression(table, device, *case)


def _compression(
    table: Table,
    device: torch.device,
    requests: int,
    tokens: int,
    window: int,
    ratio: int,
    layers: int = 32,
) -> None:
    """The three ops that compress uncompressed prompts."""
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
    state = (each(-1), unused, unused, unused[:, 0, 0].contiguous())
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
    compact = partial(ops.compact_pages, pages, block_table, *state, *select(), new_blocks)
    name = f"{requests} x {tokens} tokens, window {window}, ratio {ratio}"
    keys, kept_keys = candidates * BLOCK_SIZE, pages_out * BLOCK_SIZE
    # Two passes over the keys; the scores once; keys and values in and out.
    table.add("attention_statistics", name, seconds([statistics]), 2 * keys * 2 * HEAD_SIZE)
    table.add("select_pages", name, seconds([select]), 4 * (keys + kept_keys))
    table.add("compact_pages", name, seconds([compact]), 2 * kept_keys * 4 * HEAD_SIZE)
