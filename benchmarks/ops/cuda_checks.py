# SPDX-License-Identifier: Apache-2.0
"""Checks that only make sense on a GPU: CUDA graphs, and pools beyond 32-bit offsets."""

from __future__ import annotations

import itertools

import torch

from benchmarks.ops.cases import Shape, make_batch, make_compression
from benchmarks.ops.checker import TOLERANCE, Checker, bits
from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference

SCALE, LAYER = 0.1, 1


def check_graph(run: Checker) -> None:
    """A captured decode step, replayed after every input changed; the batch is padded."""
    shape, live = Shape(2, 8), 5
    tails = [9, 30, 100, 5, 17, -1, -1, -1]
    packed = [(2, 4), None, (3, 3), (1, 9), (5, 6), None, None, None]
    old, new = (make_batch(shape, seed, tails, packed) for seed in (1, 2))
    count, block_size, width = len(tails), shape.block_size, 2 * shape.head_size
    lengths = [1] * live + [0] * (count - live)
    start = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    device_start, device_pages = run.copies(start, old.pages)
    rows = run.copies(*old.rows)
    query, out = run.copies(*torch.randn(2, count, 32, shape.head_size).bfloat16())
    key, value = run.copies(*torch.randn(2, count, shape.heads, shape.head_size).bfloat16())
    ring = torch.zeros(16, 32, shape.head_size, dtype=torch.bfloat16, device=run.device)
    slots = torch.full((count,), -1, device=run.device)
    index = torch.full((count,), -1, device=run.device, dtype=torch.int32)
    view = (-1, shape.layers, shape.heads, block_size, width)

    def step() -> None:
        ops.write_kv(key, value, device_pages.view(view)[:, LAYER], slots)
        ops.observe_queries(query, index, ring)
        ops.paged_attention(query, device_pages, *rows, device_start, LAYER, SCALE, out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for target, source in zip((*rows, device_pages), (*new.rows, new.pages), strict=True):
        target.copy_(source)
    query.normal_()
    last = new.seq_lens[:live].long() - 1
    new_slots = torch.full((count,), -1)
    block = new.block_table[torch.arange(live), last // block_size].long()
    new_slots[:live] = block * block_size + last % block_size
    slots.copy_(new_slots)
    index[:live] = torch.arange(live, device=run.device, dtype=torch.int32) * 3
    graph.replay()
    torch.cuda.synchronize()

    pages, want_ring = new.pages.clone(), torch.zeros_like(ring, device="cpu")
    reference.write_kv(key.cpu(), value.cpu(), pages.view(view)[:, LAYER], new_slots)
    run.equal("graph, write_kv", bits(device_pages), bits(pages))
    reference.observe_queries(query.cpu(), index.cpu(), want_ring)
    run.equal("graph, observe_queries", bits(ring), bits(want_ring))
    want = torch.empty_like(out, device="cpu")
    reference.paged_attention(query.cpu(), pages, *new.rows, start, LAYER, SCALE, want)
    run.close("graph, paged_attention", out[:live], want[:live], TOLERANCE[torch.bfloat16])


def check_large_pool(run: Checker, most_bytes: float = 90e9) -> None:
    """The last blocks of a pool whose offsets need 64 bits, as large as the memory allows."""
    shape = Shape(2, 8)
    small = make_batch(shape, 5, [40, 100, 7], [(3, 9), None, (9, 12)], spare_blocks=40)
    used = small.pages.shape[0] // shape.slots
    page_bytes = small.pages[0].nbytes
    free_bytes, _ = torch.cuda.mem_get_info(run.device)
    pool_bytes = min(most_bytes, 0.85 * free_bytes)
    if pool_bytes < 1 << 33:  # fewer than 2^32 elements
        print(f"large pool: skipped, only {free_bytes / 1e9:.0f} GB are free", flush=True)
        return
    blocks = int(pool_bytes) // (shape.slots * page_bytes)
    name = f"large pool of {pool_bytes / 1e9:.0f} GB"
    shift = blocks - used
    pool = torch.empty(
        (blocks * shape.slots, *small.pages.shape[1:]), dtype=shape.dtype, device=run.device
    )
    pool[shift * shape.slots :] = small.pages.to(run.device)
    absurd = small.block_table > used
    table = torch.where(absurd, small.block_table, small.block_table + shift)
    start = torch.arange(4, dtype=torch.int32)
    query, out = torch.randn(2, 3, 32, shape.head_size).bfloat16()
    got = run.copy(out)
    ops.paged_attention(
        run.copy(query), pool, *run.copies(table, *small.rows[1:], start), LAYER, SCALE, got
    )
    reference.paged_attention(query, small.pages, *small.rows, start, LAYER, SCALE, out)
    run.close(f"{name}, paged_attention", got, out, TOLERANCE[torch.bfloat16])

    job = make_compression(small)
    scores = torch.randn(job.candidate_pages, shape.block_size)
    freed, recent = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    arguments = run.copies(scores, job.page_start, *small.state, job.new_covered, freed, recent)
    chosen = ops.select_pages(*arguments, 0, 1, int(job.counts.sum()))
    width = 12
    fresh = torch.tensor(small.free_blocks[: 3 * width], dtype=torch.int32).view(3, width)
    pages = run.copy(small.pages)
    for target, rows, new_blocks in (
        (pool, table, fresh + shift),
        (pages, small.block_table, fresh),
    ):
        state = run.copies(rows, *small.state)
        ops.compact_pages(target, *state, *chosen, run.copy(new_blocks))
    run.equal(f"{name}, compact_pages", bits(pool[shift * shape.slots :]), bits(pages))
