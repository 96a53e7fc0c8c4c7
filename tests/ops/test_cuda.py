# SPDX-License-Identifier: Apache-2.0
"""What only exists on CUDA: captured decode steps, and pools whose offsets need 64 bits."""

from __future__ import annotations

import pytest
import torch
from cases import Batch, Request, assert_close, assert_same_bits, make_batch, uneven
from op_examples import example

from kvcompress_vllm import ops
from kvcompress_vllm.ops import KEY_CHANNELS, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        not all(ops.backends()["CUDA"].values()), reason="no native CUDA kernels are built"
    ),
]

LAYERS, HEADS, GROUP, BLOCK_SIZE, HEAD_SIZE = 2, 4, 4, 16, 128
SLOTS, LAYER, SCALE = LAYERS * HEADS, 1, HEAD_SIZE**-0.5
ROWS = 9


def decode_batch(lengths: list[int], blocks: int) -> Batch:
    """Rows of one new token, every other one packed, in a pool of ``blocks`` blocks; behind them
    as many padded rows as make ``ROWS``."""
    requests = [
        Request(tail, packed=uneven(SLOTS * (1 + i), SLOTS), covered=2 + i) if i % 2 else
        Request(tail)
        for i, tail in enumerate(lengths)
    ] + [Request(0, 0)] * (ROWS - len(lengths))  # fmt: skip
    batch = make_batch(requests, LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE, torch.bfloat16)
    spare = blocks * SLOTS - len(batch.pages)
    pages = torch.cat([batch.pages, batch.pages[:1].expand(spare, -1, -1)])
    states = torch.zeros(ROWS, LAYERS, HEADS, dtype=torch.int32)
    wide = torch.zeros(ROWS, 40, dtype=torch.int32)
    batch.num_pages, old = states.clone(), batch.num_pages
    batch.num_pages[: len(old)] = old[:ROWS]
    batch.first_page, old = states.clone(), batch.first_page
    batch.first_page[: len(old)] = old[:ROWS]
    batch.covered, old = states[:, 0, 0].clone(), batch.covered
    batch.covered[: len(old)] = old[:ROWS]
    batch.block_table, old = wide, batch.block_table
    batch.block_table[:, : old.shape[1]] = old
    batch.pages = pages
    return batch


def test_captured_step_serves_any_batch():
    """One graph of a decode step, replayed for batches of other lengths, numbers and states."""
    tensors = ("pages", "block_table", "seq_lens", "state_slot", "num_pages", "first_page",
               "covered", "query_start")  # fmt: skip
    device = {name: getattr(decode_batch([5], 100), name).cuda() for name in tensors}
    query = torch.randn(ROWS, HEADS * GROUP, HEAD_SIZE, device="cuda").bfloat16()
    key, value = torch.randn(2, ROWS, HEADS, HEAD_SIZE, device="cuda").bfloat16()
    slots = torch.full((ROWS,), -1, device="cuda")
    index = torch.full((ROWS,), -1, device="cuda", dtype=torch.int32)
    ring = torch.zeros(3 * ROWS, HEADS * GROUP, HEAD_SIZE, device="cuda").bfloat16()
    out = torch.zeros_like(query)
    pages = device.pop("pages")
    cache = pages.view(-1, LAYERS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)[:, LAYER]

    def step():
        ops.write_kv(key, value, cache, slots)
        ops.observe_queries(query, index, ring)
        *rows, start = device.values()
        ops.paged_attention(query, pages, *rows, None, 0, start, LAYER, SCALE, out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([1, 33, 300, 16, 7], [40], [17, 2, 65, 200, 31, 1, 90, 5, 15]):
        batch = decode_batch(lengths, 100)
        pages.copy_(batch.pages)
        for name, tensor in device.items():
            tensor.copy_(getattr(batch, name))
        query.normal_()
        last = batch.seq_lens - 1
        new = torch.full((ROWS,), -1)
        for r in range(len(lengths)):
            block = int(batch.block_table[r, last[r] // BLOCK_SIZE])
            new[r] = block * BLOCK_SIZE + last[r] % BLOCK_SIZE
        slots.copy_(new)
        index.copy_(torch.arange(ROWS).int() * 3)
        out.fill_(7)
        graph.replay()
        on_cpu = batch.pages.view(-1, LAYERS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        reference.write_kv(key.cpu(), value.cpu(), on_cpu[:, LAYER], new)
        assert_same_bits(pages, batch.pages)
        assert_same_bits(ring[::3], query)
        expected = torch.full_like(out, 7, device="cpu")
        reference.paged_attention(query.cpu(), batch.pages, *batch.rows(), batch.query_start, LAYER,
                                  SCALE, expected)  # fmt: skip
        assert_close("attention", out, expected)
        assert (out[len(lengths) :] == 7).all()


def test_kernels_that_overlap_read_nothing_too_early():
    """Steps of all layers right behind each other, each with tables, keys and queries of its own,
    give bit by bit what they give when every op waits for the one before."""
    batches = [decode_batch(lengths, 100) for lengths in ([300, 5, 70, 40], [9], [33] * ROWS)]
    tables = ("block_table", "seq_lens", "state_slot", "num_pages", "first_page", "covered",
              "query_start")  # fmt: skip
    given = [{name: getattr(batch, name).cuda() for name in tables} for batch in batches]
    content, steps = torch.randn(batches[0].pages.shape, device="cuda").bfloat16(), 30
    queries = torch.randn(steps, LAYERS, ROWS, HEADS * GROUP, HEAD_SIZE, device="cuda").bfloat16()
    new = torch.randn(steps, 2, ROWS, HEADS, HEAD_SIZE, device="cuda").bfloat16()
    slots = torch.full((len(batches), ROWS), -1)
    for i, batch in enumerate(batches):
        for r in range(ROWS):
            if batch.seq_lens[r]:
                block, place = divmod(int(batch.seq_lens[r]) - 1, BLOCK_SIZE)
                slots[i, r] = int(batch.block_table[r, block]) * BLOCK_SIZE + place
    slots, index = slots.cuda(), torch.arange(ROWS, device="cuda", dtype=torch.int32)

    def run(apart: bool) -> torch.Tensor:
        pages = content.clone()
        rows = {name: given[0][name].clone() for name in tables}
        ring = torch.zeros(ROWS, HEADS * GROUP, HEAD_SIZE, device="cuda").bfloat16()
        query, out = torch.empty_like(queries[0, 0]), torch.zeros_like(queries)
        wait = torch.cuda.synchronize if apart else lambda: None

        def step(number: int) -> None:
            for name in tables:
                rows[name].copy_(given[number % len(batches)][name])
            for layer in range(LAYERS):
                cache = pages.view(-1, LAYERS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)[:, layer]
                query.copy_(queries[number, layer])
                wait()
                ops.write_kv(*new[number], cache, slots[number % len(batches)])
                wait()
                ops.observe_queries(query, index, ring)
                wait()
                *table, start = rows.values()
                ops.paged_attention(query, pages, *table, None, 0, start, layer, SCALE,
                                    out[number, layer])  # fmt: skip
                wait()

        if apart:
            for number in range(steps):
                step(number)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for number in range(steps):
                    step(number)
            pages.copy_(content)
            graph.replay()
        torch.cuda.synchronize()
        return out

    expected = run(apart=True)
    assert_same_bits(run(apart=False), expected)


def test_captured_key_statistics():
    """Nothing waits for the device, and what was captured depends on no number of the rows."""
    shape = (LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE, torch.bfloat16)
    packed = Request(100, packed=uneven(3 * SLOTS, SLOTS), covered=9)
    first = make_batch([Request(700), packed], *shape)
    second = make_batch([packed, Request(40)], *shape)
    device = [t.cuda() for t in (first.pages, *first.rows()[:-2])]
    covered = (first.seq_lens // BLOCK_SIZE).int().cuda()
    starts = torch.tensor([0, 43 * SLOTS], device="cuda")
    total = 60 * SLOTS

    def step():
        return ops.key_statistics(*device, None, 0, covered, starts, total, KEY_CHANNELS)

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for batch in (first, second, first):
        for target, source in zip(device, (batch.pages, *batch.rows()[:-2]), strict=True):
            # The second batch is smaller; what it leaves of the first must not be read.
            target[tuple(slice(n) for n in source.shape)] = source.cuda()
        covered.copy_(batch.seq_lens // BLOCK_SIZE)
        graph.replay()
        expected = reference.key_statistics(
            *(t.cpu() for t in device), None, 0, covered.cpu(), starts.cpu(), total, KEY_CHANNELS
        )
        assert_close("norm", out[0], expected[0])
        assert_close("likeness", out[1], expected[1])
        assert_close("norm", out[2], expected[2])


def test_echo_scores_do_not_wait():
    """Prefill steps are launched while the device still works on the step before."""
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in example("echo_scores")]
    ops.echo_scores(*args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.echo_scores(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pool_with_64_bit_offsets():
    """The last blocks of a pool of more than 2^32 elements, against a small pool."""
    small = make_batch(
        [Request(40), Request(100, packed=uneven(3 * SLOTS, SLOTS), covered=9), Request(7)],
        LAYERS, HEADS, BLOCK_SIZE, HEAD_SIZE, torch.bfloat16, spare_blocks=9,
    )  # fmt: skip
    elements = (1 << 32) + (1 << 24)
    per_block = SLOTS * BLOCK_SIZE * 2 * HEAD_SIZE
    if torch.cuda.mem_get_info()[0] < 3 * elements:
        pytest.skip("needs 13 GB of free GPU memory")
    blocks = elements // per_block
    used = len(small.pages) // SLOTS
    pool = torch.empty(blocks * SLOTS, *small.pages.shape[1:], dtype=torch.bfloat16, device="cuda")
    pool[(blocks - used) * SLOTS :] = small.pages.cuda()
    b = small.to("cuda")
    table = torch.where(b.block_table < used, b.block_table + blocks - used, b.block_table)
    query = torch.randn(3, HEADS * GROUP, HEAD_SIZE, device="cuda").bfloat16()
    results = []
    for pages, rows in ((b.pages, b.block_table), (pool, table)):
        out = torch.empty_like(query)
        ops.paged_attention(query, pages, rows, *b.rows()[1:], b.query_start, LAYER, SCALE, out)
        results.append(out)
    assert_same_bits(*results)

    covered = (b.seq_lens // BLOCK_SIZE).int()
    starts = torch.tensor([0, 2 * SLOTS, 11 * SLOTS], device="cuda")
    statistics = [
        ops.key_statistics(pages, rows, *b.rows()[1:], covered, starts, 11 * SLOTS, KEY_CHANNELS)
        for pages, rows in ((b.pages, b.block_table), (pool, table))
    ]
    assert_same_bits(*statistics)
    assert (statistics[0][0] > 0).all()

    segments = torch.tensor([[0, 30, 40, 0]], dtype=torch.int32, device="cuda")
    rotation = torch.randn(HEAD_SIZE // 2, 2, device="cuda")
    scores = torch.zeros(pool.shape[:2], device="cuda")
    few = scores[: used * SLOTS].clone()
    query = torch.randn(10, HEADS * GROUP, HEAD_SIZE, device="cuda").bfloat16()
    for pages, rows, out in ((b.pages, b.block_table, few), (pool, table, scores)):
        ops.echo_scores(query, pages, rows, *b.rows()[1:], segments, rotation, LAYER, 256, 4, False,
                        SCALE, out)  # fmt: skip
    assert (few > 0).sum() == 10 * HEADS
    assert_same_bits(scores[(blocks - used) * SLOTS :], few)

    kept = torch.ones(3, LAYERS, HEADS, dtype=torch.int32, device="cuda")
    kept[2] = 0
    first = torch.arange(3 * SLOTS, dtype=torch.int32, device="cuda").view_as(kept)
    first[2] = 2 * SLOTS
    keys = torch.arange(BLOCK_SIZE, dtype=torch.int32, device="cuda").repeat(2 * SLOTS, 1)
    new = torch.tensor([[small.free_blocks[i]] for i in range(3)], dtype=torch.int32).cuda()
    for pages, rows, blocks_of in (
        (b.pages, b.block_table, new),
        (pool, table, new + blocks - used),
    ):
        ops.compact_pages(pages, rows, *b.state(), kept, first, keys, blocks_of, None)
    assert_same_bits(pool[(blocks - used) * SLOTS :], b.pages)
