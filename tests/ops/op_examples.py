# SPDX-License-Identifier: Apache-2.0
"""One valid call per op, with finite memory only, for tests that treat all ops alike."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from cases import Request, make_batch, uneven

from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.ops import reference

LAYERS, HEADS, GROUP, BLOCK_SIZE, HEAD_SIZE, WINDOW = 2, 2, 2, 16, 64, 20
SLOTS = LAYERS * HEADS


def example(
    op: str, device: str = "cpu", scale: int = 1, page_format: PageFormat = PageFormat.AUTO
) -> list[Any]:
    """Arguments of ``op``; ``scale`` makes it larger. Packed pages in ``page_format``."""
    if op == "fit_scales" and page_format is PageFormat.AUTO:
        page_format = PageFormat.INT4  # the others have no scales
    m = page_format.blocks_per_page
    dtype = torch.float32 if page_format is PageFormat.AUTO else torch.bfloat16
    tail = 5 * BLOCK_SIZE * scale * m
    requests = [
        Request(tail=tail + 3, queries=tail // 2),
        Request(tail=tail, packed=uneven(2 * SLOTS, SLOTS), covered=3),
        Request(tail=0, queries=0),
    ]
    shape = LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE
    batch = make_batch(requests, *shape, dtype, 30 * scale, page_format)
    batch = batch.poisoned(0.0)
    num_tokens = int(batch.query_start[-1])
    new_covered = (batch.seq_lens // BLOCK_SIZE // m * m).int()
    pages_per_head = torch.tensor([
        [5 * scale] * SLOTS,
        [n + 5 * scale for n in uneven(2 * SLOTS, SLOTS)],
        [0] * SLOTS,
    ])  # fmt: skip
    total = pages_per_head.sum(-1)
    candidates = int(total.sum()) * m
    page_start = (total.cumsum(0) - total) * m
    query = torch.randn(num_tokens, HEADS * GROUP, HEAD_SIZE).to(dtype)
    kv = torch.randn(2, num_tokens, HEADS, HEAD_SIZE).to(dtype)
    ring = torch.randn(LAYERS, 4, WINDOW, HEADS * GROUP, HEAD_SIZE).to(dtype)
    if op == "write_kv":
        cache = batch.pages.view(-1, LAYERS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)[:, 0]
        slots = torch.randperm(cache.shape[0] * BLOCK_SIZE)[:num_tokens]
        args = [kv[0], kv[1], cache, slots]
    elif op == "observe_queries":
        index = torch.full((num_tokens,), -1, dtype=torch.int32)
        index[-WINDOW:] = torch.randperm(WINDOW).int()
        args = [query, index, ring[0].flatten(0, 1)]
    elif op == "paged_attention":
        args = [query, batch.pages, *batch.rows(), batch.query_start, 1, HEAD_SIZE**-0.5,
                torch.zeros_like(query)]  # fmt: skip
    elif op == "attention_statistics":
        args = [ring, batch.pages, *batch.rows(), torch.tensor([2, 0, 1], dtype=torch.int32),
                torch.tensor([WINDOW, 9, 0], dtype=torch.int32), new_covered, page_start,
                candidates, ops.ATTENTION_CHANNELS, 2, HEAD_SIZE**-0.5]  # fmt: skip
    elif op == "key_statistics":
        args = [batch.pages, *batch.rows(), new_covered, page_start, candidates,
                ops.KEY_CHANNELS]  # fmt: skip
    elif op == "echo_scores":
        first = tail + 3 - tail // 2
        begins = [first, *range(first + 30, tail + 3, 250)]
        segments = torch.tensor(
            [[0, a, b, a - first] for a, b in pairwise([*begins, tail + 3])], dtype=torch.int32
        )
        args = [query, batch.pages, *batch.rows(), segments, torch.randn(24, 2), 1,
                250, 4, False, HEAD_SIZE**-0.5,
                torch.zeros(len(batch.pages), m * BLOCK_SIZE)]  # fmt: skip
    elif op == "select_pages":
        freed = torch.tensor([[8 * scale], [12 * scale], [0]], dtype=torch.int32)
        args = [torch.randn(candidates, BLOCK_SIZE), page_start, *batch.state(), new_covered,
                freed, torch.full((3,), 5, dtype=torch.int32), 4, 1,
                int(total.sum() - freed.sum())]  # fmt: skip
    else:
        kept = torch.tensor(
            [[2 * scale, 3 * scale, 0, 3 * scale], [4 * scale] * SLOTS, [0] * SLOTS]
        )
        keys = torch.cat([
            torch.randperm(int(n) * m * BLOCK_SIZE)[: int(k) * m * BLOCK_SIZE].sort().values
            for k, n in zip(kept.flatten(), pages_per_head.flatten(), strict=True)
        ])  # fmt: skip
        first = (kept.flatten().cumsum(0) - kept.flatten()).int()
        new_blocks = torch.zeros(3, 4 * scale, dtype=torch.int32)
        for r, blocks in enumerate(kept.sum(-1).div(SLOTS, rounding_mode="floor").tolist()):
            for i in range(blocks):
                new_blocks[r, i] = batch.free_blocks.pop()
        shape = (3, LAYERS, HEADS)
        kept = (kept.int().view(shape), first.view(shape), keys.int().view(-1, m * BLOCK_SIZE))
        args = [batch.pages, batch.block_table, *batch.state(), *kept]
        if op == "compact_pages":
            coded = page_format is not PageFormat.AUTO
            args += [new_blocks, reference.fit_scales(*args) if coded else None]
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
