# SPDX-License-Identifier: Apache-2.0
"""Every op against the reference on the CPU; inputs from :mod:`benchmarks.ops.cases`."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from benchmarks.ops.cases import Shape, make_compression, random_batch
from benchmarks.ops.checker import TOLERANCE, Checker, bits
from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _key_and_value(fused: Tensor, offset: int, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """Strided views into a fused projection, at any alignment."""
    width = heads * size
    key = fused[:, offset : offset + width].unflatten(1, (heads, size))
    value = fused[:, offset + width : offset + 2 * width].unflatten(1, (heads, size))
    return key, value


def check_copies(run: Checker) -> None:
    """``write_kv`` and ``observe_queries``, bit for bit."""
    tokens, block_size, blocks, ring_size = 37, 16, 64, 40
    dtypes = (torch.bfloat16, torch.float32)
    for dtype, heads, size, offset in itertools.product(dtypes, (1, 8), (64, 80, 128), (0, 1)):
        name = f"{dtype} {heads} heads of {size}, offset {offset}"
        fused = torch.randn(tokens + 5, 3 * heads * size + 7 + offset).to(dtype)
        key, value = _key_and_value(fused, offset, heads, size)
        device_key, device_value = _key_and_value(run.copy(fused), offset, heads, size)
        slots = torch.randperm(blocks * block_size)[:tokens]
        slots[torch.randperm(tokens)[:9]] = -1
        want = torch.randn(blocks, 3, heads, block_size, 2 * size).to(dtype)
        got = run.copy(want)
        reference.write_kv(key, value, want[:, 1], slots)
        ops.write_kv(device_key, device_value, got[:, 1], run.copy(slots))
        run.equal(f"write_kv {name}", got, want)
        index = torch.where(slots < 0, -1, torch.randperm(ring_size)[:tokens]).int()
        want = torch.randn(ring_size, heads, size).to(dtype)
        got = run.copy(want)
        reference.observe_queries(key, index, want)
        ops.observe_queries(device_key, run.copy(index), got)
        run.equal(f"observe_queries {name}", got, want)


def _attention_case(
    run: Checker, name: str, shape: Shape, seed: int, lengths: list[int], longest: int
) -> None:
    """``lengths``: query tokens per request; of requests without any, every other one is empty."""
    batch = random_batch(shape, seed, len(lengths), longest, least_tail=max(1, *lengths))
    torch.manual_seed(seed)
    for r, length in enumerate(lengths):
        if length == 0 and r % 2:
            batch.seq_lens[r] = 0
    counts = [n if seq_len else 0 for n, seq_len in zip(lengths, batch.seq_lens, strict=True)]
    start = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    tokens, width = int(start[-1]) + 3, shape.heads * shape.group * shape.head_size
    fused = torch.randn(tokens, width + seed % 3).to(shape.dtype)
    query = fused[:, :width].unflatten(1, (-1, shape.head_size))
    device_query = run.copy(fused)[:, :width].unflatten(1, (-1, shape.head_size))
    sentinel = torch.full((tokens, *query.shape[1:]), 77.0, dtype=shape.dtype)
    scale = shape.head_size**-0.5
    arguments = (batch.pages, *batch.rows, start)
    device_arguments = run.copies(*arguments)
    end = int(start[-1])
    for layer in range(shape.layers):
        want = sentinel.clone()
        reference.paged_attention(query, *arguments, layer, scale, want)
        got, again = run.copies(sentinel, sentinel)
        for out in (got, again):
            ops.paged_attention(device_query, *device_arguments, layer, scale, out)
        run.equal(f"{name}, rows behind the last token", got[end:], sentinel[end:])
        run.equal(f"{name}, same again", again, got)
        run.close(name, got[:end], want[:end], TOLERANCE[shape.dtype])


def check_attention(run: Checker) -> None:
    """``paged_attention`` for decode, prefill and mixed batches."""
    layouts = ((4, 16), (1, 8), (16, 32), (7, 16))
    cases = itertools.product((64, 96, 128, 256), layouts, DTYPES)
    for seed, (size, (group, block_size), dtype) in enumerate(cases):
        shape = Shape(2, 2, group, size, block_size, dtype)
        name = f"head size {size}, group {group}, block size {block_size}, {dtype}"
        if seed % 2:
            _attention_case(run, f"decode {name}", shape, seed, [1] * 9, 200)
        mixed = [1, 40, 0, 3, 1, 70, 0, 17]
        _attention_case(run, f"mixed {name}", shape, seed + 100, mixed, 150)
        if seed % 3 == 0:
            few = [3, 0, 0, 1, 0, 0, 0, 0]
            _attention_case(run, f"few tokens {name}", shape, seed + 200, few, 60)
    _attention_case(run, "long", Shape(1, 2), 7, [1, 1, 1], 9000)
    _attention_case(run, "many", Shape(2, 8), 8, [1] * 300, 100)
    _attention_case(run, "one", Shape(1, 1), 9, [1], 5)
    _attention_case(run, "chunk", Shape(1, 2), 10, [300, 1, 1], 700)


def _statistics_case(
    run: Checker,
    name: str,
    shape: Shape,
    seed: int,
    count: int,
    longest: int,
    window: int,
    magnitude: float = 1.0,
) -> None:
    """``magnitude`` of the queries: 0 makes attention flat, 20 makes it sharp."""
    batch = random_batch(shape, seed, count, longest, least_tail=window)
    job = make_compression(batch)
    torch.manual_seed(seed)
    observe = torch.randperm(count + 3)[:count].int()
    heads = shape.heads * shape.group
    ring = torch.randn(shape.layers, count + 3, window, heads, shape.head_size)
    ring = ring.mul(magnitude).to(shape.dtype)
    queries = torch.randint(1, window + 1, (count,), dtype=torch.int32)
    tail = (observe, queries, job.new_covered, job.page_start)
    arguments = (ring, batch.pages, *batch.rows, *tail)
    pages, scale = job.candidate_pages + 1, shape.head_size**-0.5
    channels = ops.channel_mask(range(len(ops.CHANNELS)))
    want = reference.attention_statistics(*arguments, pages, channels, 1, scale)
    device_arguments = run.copies(*arguments)
    got = ops.attention_statistics(*device_arguments, pages, channels, 1, scale)
    again = ops.attention_statistics(*device_arguments, pages, channels, 1, scale)
    run.equal(f"{name}, same again", again, got)
    for channel, label in enumerate(ops.CHANNELS):
        if channel != ops.LOW_COUNT:
            # Near p = 1 the entropy vanishes, and its error is that of p.
            tolerance = 1e-4 if channel == ops.ENTROPY else 3e-5
            run.close(f"{name}, {label}", got[channel], want[channel], tolerance)
    # A probability beside the threshold may fall on either side of it.
    off = (got[ops.LOW_COUNT].cpu() - want[ops.LOW_COUNT]).abs()
    wrong = float((off > 0).double().mean())
    run.check(f"{name}, low count", wrong < 1e-3 and float(off.max()) <= 2, f"{wrong:.1e} differ")


def check_statistics(run: Checker) -> None:
    """``attention_statistics``."""
    layouts = ((4, 16, 8), (1, 8, 3), (7, 32, 32), (16, 16, 5))
    cases = itertools.product((64, 96, 128, 256), DTYPES, layouts)
    for seed, (size, dtype, (group, block_size, window)) in enumerate(cases):
        shape = Shape(2, 2, group, size, block_size, dtype)
        name = f"head size {size}, group {group}, block size {block_size}, window {window}, {dtype}"
        _statistics_case(run, f"statistics {name}", shape, seed, 4, 300, window)
    _statistics_case(run, "statistics long", Shape(1, 2), 5, 2, 9000, 8)
    _statistics_case(run, "statistics flat", Shape(1, 2), 6, 2, 900, 8, 0.0)
    _statistics_case(run, "statistics sharp", Shape(1, 2), 6, 2, 900, 8, 20.0)
    _statistics_case(run, "statistics wide window", Shape(1, 2, 16, 256), 7, 2, 300, 64)


def _make_scores(kind: str, shape: tuple[int, int]) -> Tensor:
    scores = torch.randn(shape)
    if kind == "ties":
        return scores.mul(2).round().mul(0.5)  # has -0.0 beside 0.0
    if kind == "constant":
        return scores.zero_()
    if kind == "skewed":
        return scores.mul(8).exp()
    if kind == "special":
        inf, nan = float("inf"), float("nan")
        special = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38])
        pick = torch.randint(0, 2 * len(special), shape)
        replaced = special[pick.clamp_max(len(special) - 1)]
        return torch.where(pick < len(special), replaced, scores)
    return scores


def _selection_case(
    run: Checker,
    name: str,
    shape: Shape,
    seed: int,
    count: int,
    longest: int,
    kind: str,
    groups: int,
    floor: int,
    share: float,
) -> None:
    """Frees ``share`` of the pages above the floor, then compacts what was kept."""
    spare = 4 * count * (longest // shape.block_size + 1)
    batch = random_batch(shape, seed, count, longest, 2 * shape.block_size, spare)
    job = make_compression(batch)
    torch.manual_seed(seed)
    scores = _make_scores(kind, (job.candidate_pages, shape.block_size))
    room = floor * shape.block_size
    sinks = min(4, room)
    recent = torch.randint(0, room - sinks + 1, (count,), dtype=torch.int32)
    free = (job.counts - floor).clamp_min(0).view(count, groups, -1).sum(-1)
    freed = (free * share).int()
    if groups == 1 and 0 < share < 1:  # keep whole blocks, as the scheduler does
        freed = freed - (freed - job.counts.view(count, 1, -1).sum(-1)) % shape.slots
        freed = torch.where(freed < 0, freed + shape.slots, freed).minimum(free).int()
    kept = int(job.counts.sum() - freed.sum())
    arguments = (scores, job.page_start, *batch.state, job.new_covered, freed, recent)
    want = reference.select_pages(*arguments, sinks, floor, kept)
    got = ops.select_pages(*run.copies(*arguments), sinks, floor, kept)
    for part, g, w in zip(("pages", "first", "keys"), got, want, strict=True):
        run.equal(f"{name}, {part}", g, w)
    width = -(-int(want[0].view(count, -1).sum(-1).max()) // shape.slots)
    blocks = [batch.free_blocks.pop() for _ in range(count * width)]
    new_blocks = torch.full((count, width + 2), -1, dtype=torch.int32)
    new_blocks[:, :width] = torch.tensor(blocks).view(count, width)
    move = (batch.block_table, *batch.state, *want, new_blocks)
    expected, pages = batch.pages.clone(), run.copy(batch.pages)
    reference.compact_pages(expected, *move)
    ops.compact_pages(pages, *run.copies(*move))
    run.equal(f"{name}, compact", bits(pages), bits(expected))


def check_selection(run: Checker) -> None:
    """``select_pages`` and ``compact_pages``, bit for bit."""
    kinds = ("plain", "ties", "constant", "special", "skewed")
    cases = itertools.product(kinds, (1, 3, 6), (1, 2), (0.0, 0.6, 1.0))
    for seed, (kind, groups, floor, share) in enumerate(cases):
        dtype = torch.float32 if seed % 2 else torch.bfloat16
        shape = Shape(3, 2, 1, 64, 16 if seed % 3 else 8, dtype)
        name = f"select {kind}, {groups} groups, floor {floor}, share {share}"
        _selection_case(run, name, shape, seed, 3, 400, kind, groups, floor, share)
    long, many = Shape(1, 2, 1, 64, 32), Shape(8, 8, 1, 64)
    wide = Shape(1, 2, 1, 256, 16, torch.float32)
    _selection_case(run, "select long", long, 1, 2, 40000, "ties", 1, 2, 0.7)
    _selection_case(run, "select many", many, 2, 20, 200, "skewed", 1, 1, 0.5)
    _selection_case(run, "select wide", wide, 3, 2, 200, "plain", 2, 1, 0.5)
