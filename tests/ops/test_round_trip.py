# SPDX-License-Identifier: Apache-2.0
"""Statistics, selection and compaction together, seen through attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import DTYPES, Batch, Request, assert_close, make_batch

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout

LAYERS, HEADS, GROUP, BLOCK_SIZE, HEAD_SIZE, WINDOW = 2, 2, 3, 16, 64, 8
SLOTS = LAYERS * HEADS
SCALE = HEAD_SIZE**-0.5


def compress(batch: Batch, kept_blocks: list[int], device: str) -> tuple[Batch, torch.Tensor]:
    """What the worker does at the start of a step: all full blocks of every request become
    ``kept_blocks`` packed ones. Returns the new rows, and ``kept_keys`` split by the op."""
    b = batch.to(device)
    requests = len(kept_blocks)
    new_covered = (b.seq_lens // BLOCK_SIZE).int()
    old = torch.tensor([
        0 if slot < 0 else int(batch.covered[slot]) for slot in batch.state_slot.tolist()
    ])  # fmt: skip
    packed = torch.tensor([
        0 if slot < 0 else int(batch.num_pages[slot].sum()) for slot in batch.state_slot.tolist()
    ])  # fmt: skip
    total = packed + (new_covered.cpu() - old) * SLOTS
    kept = torch.tensor(kept_blocks) * SLOTS
    start = (total.cumsum(0) - total).to(device)
    ring = torch.randn(LAYERS, requests, WINDOW, HEADS * GROUP, HEAD_SIZE)
    ring = ring.to(batch.pages.dtype).to(device)
    statistics = ops.attention_statistics(
        ring, b.pages, *b.rows(), torch.arange(requests, dtype=torch.int32, device=device),
        torch.full((requests,), WINDOW, dtype=torch.int32, device=device), new_covered, start,
        int(total.sum()), ops.channel_mask([ops.SUM]), 1, SCALE,
    )  # fmt: skip
    freed = (total - kept).int().view(-1, 1).to(device)
    recent = torch.full((requests,), 4, dtype=torch.int32, device=device)
    kept_pages, kept_first, kept_keys = ops.select_pages(
        statistics[0], start, *b.state(), new_covered, freed, recent, 4, 1, int(kept.sum())
    )
    new_blocks = torch.zeros(requests, max(kept_blocks), dtype=torch.int32)
    for r, count in enumerate(kept_blocks):
        new_blocks[r, :count] = torch.tensor([batch.free_blocks.pop() for _ in range(count)])
    ops.compact_pages(b.pages, b.block_table, *b.state(), kept_pages, kept_first, kept_keys,
                      new_blocks.to(device), None)  # fmt: skip
    table = torch.zeros_like(b.block_table)
    for r, count in enumerate(kept_blocks):
        table[r, :count] = new_blocks[r, :count].to(device)
        end, covered = -(-int(b.seq_lens[r]) // BLOCK_SIZE), int(new_covered[r])
        # The tail keeps its place in the row: the row has its logical length.
        table[r, covered:end] = b.block_table[r, covered:end]
    first = torch.stack([layout.exclusive_cumsum(pages) for pages in kept_pages.cpu()]).to(device)
    slots = torch.arange(requests, dtype=torch.int32, device=device)
    after = dataclasses.replace(b, block_table=table, state_slot=slots, num_pages=kept_pages,
                                first_page=first, covered=new_covered)  # fmt: skip
    return after, kept_keys


def attend(batch: Batch, query: torch.Tensor, layer: int) -> torch.Tensor:
    out = torch.empty_like(query)
    ops.paged_attention(query, batch.pages, *batch.rows(), batch.query_start, layer, SCALE, out)
    return out


def flat_keys(batch: Batch, request: int, layer: int) -> torch.Tensor:
    """``[H, seq_len, 2 * D]`` of a request that was never compressed, by table alone."""
    seq_len = int(batch.seq_lens[request])
    blocks = batch.block_table[request, : -(-seq_len // BLOCK_SIZE)].long()
    pages = batch.pages.view(-1, LAYERS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)[blocks, layer]
    return pages.transpose(0, 1).flatten(1, 2)[:, :seq_len]


REQUESTS = [Request(tail=6 * BLOCK_SIZE + 5), Request(tail=4 * BLOCK_SIZE + 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_rows_attend_to_the_kept_keys_and_the_tail(device, dtype):
    before = make_batch(REQUESTS, LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE, dtype, 10)
    original = before.to(device)
    query = torch.randn(2, HEADS * GROUP, HEAD_SIZE).to(dtype).to(device)
    after, kept_keys = compress(before, [3, 2], device)
    for layer in range(LAYERS):
        actual = attend(after, query, layer)
        place = 0
        for r in range(2):
            keys = flat_keys(original, r, layer).float()
            covered = int(after.covered[r]) * BLOCK_SIZE
            for index in range(SLOTS):
                count = int(after.num_pages[r].flatten()[index])
                kept = kept_keys[place : place + count].flatten().long()
                place += count
                if index // HEADS != layer:
                    continue
                head = index % HEADS
                alive = torch.cat([keys[head, kept], keys[head, covered:]])
                q = query[r, head * GROUP : (head + 1) * GROUP].float()
                p = (q @ alive[:, :HEAD_SIZE].t() * SCALE).softmax(-1)
                expected = (p @ alive[:, HEAD_SIZE:]).to(dtype)
                assert_close("attention", actual[r, head * GROUP : (head + 1) * GROUP], expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_everything_changes_nothing(device, dtype):
    """C = F, once and again: the same keys in packed pages, attended to in the same order."""
    before = make_batch(REQUESTS, LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE, dtype, 30)
    query = torch.randn(2, HEADS * GROUP, HEAD_SIZE).to(dtype).to(device)
    expected = [attend(before.to(device), query, layer) for layer in range(LAYERS)]
    once, _ = compress(before, [6, 4], device)
    twice, _ = compress(once, [6, 4], device)
    for after in (once, twice):
        for layer in range(LAYERS):
            assert torch.equal(attend(after, query, layer), expected[layer])


def test_compressing_twice_keeps_a_subset(device):
    """The second time chooses among packed pages; attention sees what it kept of the first."""
    before = make_batch(REQUESTS, LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE, torch.float32, 30)
    query = torch.randn(2, HEADS * GROUP, HEAD_SIZE, device=device)
    once, first_keys = compress(before, [4, 3], device)
    twice, second_keys = compress(once, [2, 2], device)
    first = first_keys.split(once.num_pages.flatten().tolist())
    second = second_keys.split(twice.num_pages.flatten().tolist())
    original = before.to(device)
    for layer in range(LAYERS):
        actual = attend(twice, query, layer)
        for r in range(2):
            keys = flat_keys(original, r, layer)
            covered = int(twice.covered[r]) * BLOCK_SIZE
            for head in range(HEADS):
                index = r * SLOTS + layer * HEADS + head
                kept = first[index].flatten().long()[second[index].flatten().long()]
                alive = torch.cat([keys[head, kept], keys[head, covered:]])
                q = query[r, head * GROUP : (head + 1) * GROUP]
                p = (q @ alive[:, :HEAD_SIZE].t() * SCALE).softmax(-1)
                expected = p @ alive[:, HEAD_SIZE:]
                assert_close("attention", actual[r, head * GROUP : (head + 1) * GROUP], expected)
