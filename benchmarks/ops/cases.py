# SPDX-License-Identifier: Apache-2.0
"""Random, hostile batches: everything that an op must not read is NaN or an absurd number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcompress_vllm import layout

ABSURD = 1 << 30


@dataclass
class Shape:
    layers: int = 2
    heads: int = 2
    group: int = 4
    head_size: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def slots(self) -> int:
        return self.layers * self.heads


@dataclass
class Batch:
    """The six tensors of a batch, its page pool, and the free blocks; all on the CPU."""

    shape: Shape
    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    state_slot: Tensor
    num_pages: Tensor
    first_page: Tensor
    covered: Tensor
    free_blocks: list[int]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        return (
            self.block_table,
            self.seq_lens,
            self.state_slot,
            self.num_pages,
            self.first_page,
            self.covered,
        )

    @property
    def state(self) -> tuple[Tensor, ...]:
        return self.rows[2:]


def deal(total: int, heads: int, skew: float, generator: torch.Generator, least: int) -> Tensor:
    """``total`` pages dealt to ``heads`` at random, at least ``least`` each."""
    weights = (torch.randn(heads, generator=generator) * skew).exp()
    share = (weights / weights.sum() * (total - least * heads)).floor().int() + least
    share[torch.randint(heads, (1,), generator=generator)] += total - int(share.sum())
    return share


def make_batch(
    shape: Shape,
    seed: int,
    tails: list[int],
    packed: list[tuple[int, int] | None],
    spare_blocks: int = 0,
    skew: float = 1.0,
) -> Batch:
    """A batch of ``len(tails)`` requests.

    Args:
        tails: tokens behind the covered blocks; -1 makes an empty padding row.
        packed: ``(C, F)`` or None per request.
    """
    rng = torch.Generator().manual_seed(seed)
    layers, heads, block_size = shape.layers, shape.heads, shape.block_size
    needed = [
        0 if tail < 0 else (p[0] if p else 0) + -(-tail // block_size)
        for tail, p in zip(tails, packed, strict=True)
    ]
    total = 1 + sum(needed) + spare_blocks
    width = (
        max(
            (p[1] if p else 0) + -(-max(t, 0) // block_size)
            for t, p in zip(tails, packed, strict=True)
        )
        + 2
    )
    free = (torch.randperm(total - 1, generator=rng) + 1).tolist()
    count = len(tails)
    states = count + 2
    slots = torch.randperm(states, generator=rng)
    block_table = torch.full((count, width), ABSURD, dtype=torch.int32)
    seq_lens = torch.zeros(count, dtype=torch.int32)
    state_slot = torch.full((count,), layout.NOT_PACKED, dtype=torch.int32)
    num_pages = torch.full((states, layers, heads), ABSURD, dtype=torch.int32)
    first_page = torch.full_like(num_pages, ABSURD)
    covered = torch.full((states,), ABSURD, dtype=torch.int32)
    pages = torch.full(
        (total * shape.slots, block_size, 2 * shape.head_size), float("nan"), dtype=shape.dtype
    )
    for r, (tail, p) in enumerate(zip(tails, packed, strict=True)):
        if tail < 0:
            continue
        full, packed_blocks = (p[1], p[0]) if p else (0, 0)
        seq_lens[r] = full * block_size + tail
        if p:
            slot = int(slots[r])
            state_slot[r] = slot
            least = 0 if tail else 1
            num_pages[slot] = deal(packed_blocks * shape.slots, shape.slots, skew, rng, least).view(
                layers, heads
            )
            first_page[slot] = layout.exclusive_cumsum(num_pages[slot])
            covered[slot] = full
            block_table[r, :packed_blocks] = torch.tensor(
                [free.pop() for _ in range(packed_blocks)]
            )
            block_table[r, packed_blocks:full] = 0
        blocks = -(-tail // block_size)
        block_table[r, full : full + blocks] = torch.tensor([free.pop() for _ in range(blocks)])
        for index in range(shape.slots):
            layer, head = divmod(index, heads)
            n_packed = int(num_pages[int(state_slot[r]), layer, head]) if p else 0
            first = int(first_page[int(state_slot[r]), layer, head]) if p else 0
            n = layout.num_keys(int(seq_lens[r]), full, n_packed, block_size)
            j = torch.arange(-(-n // block_size))
            ids = layout.page_id(block_table[r], full, n_packed, first, index, shape.slots, j)
            content = torch.randn(len(j) * block_size, 2 * shape.head_size, generator=rng)
            content[n:] = float("nan")
            pages[ids] = content.view(len(j), block_size, -1).to(shape.dtype)
    return Batch(
        shape, pages, block_table, seq_lens, state_slot, num_pages, first_page, covered, free
    )


def random_batch(
    shape: Shape, seed: int, count: int, longest: int, least_tail: int = 1, spare_blocks: int = 0
) -> Batch:
    """Some rows packed, some not, some padding."""
    rng = torch.Generator().manual_seed(seed)
    tails, packed = [], []
    for _ in range(count):
        kind = int(torch.randint(5, (1,), generator=rng))
        tails.append(int(torch.randint(least_tail, longest + 1, (1,), generator=rng)))
        if kind == 0 and least_tail <= 1:
            tails[-1] = -1
        blocks = int(torch.randint(1, max(2, longest // shape.block_size), (1,), generator=rng))
        extra = int(torch.randint(0, 2 * blocks + 1, (1,), generator=rng))
        packed.append((blocks, blocks + extra) if kind >= 2 else None)
    return make_batch(shape, seed, tails, packed, spare_blocks)


@dataclass
class Compression:
    """Arguments of the compression ops for a batch."""

    new_covered: Tensor
    page_start: Tensor
    candidate_pages: int
    counts: Tensor  # [R, L, H] candidate pages


def make_compression(batch: Batch) -> Compression:
    shape = batch.shape
    new_covered = batch.seq_lens // shape.block_size
    counts, starts, start = [], [], 0
    for r, slot in enumerate(batch.state_slot.tolist()):
        packed = (
            batch.num_pages[slot]
            if slot >= 0
            else torch.zeros(shape.layers, shape.heads, dtype=torch.int32)
        )
        old = int(batch.covered[slot]) if slot >= 0 else 0
        counts.append(packed + int(new_covered[r]) - old)
        starts.append(start)
        start += int(counts[-1].sum())
    return Compression(new_covered.int(), torch.tensor(starts), start, torch.stack(counts))
