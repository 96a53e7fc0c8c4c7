# SPDX-License-Identifier: Apache-2.0
"""Hostile inputs for the ops, and how results are compared.

Letters as in ``cache/layout.py``. Block ids are shuffled, tables are slices of wider
ones, whatever the op must not read is poison: NaN in memory that no request owns, huge numbers in
unused table entries and unused state rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress_vllm.cache import fitting, layout
from kvcompress_vllm.cache import page_format as formats
from kvcompress_vllm.cache.page_format import SCALE_DTYPE, PageFormat

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POISON_ID = 1 << 30
# What the attention kernels are compiled for on CUDA; they refuse the rest by name. The CPU
# kernels take every multiple of 8.
CUDA_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 256)

TOLERANCES: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    # (what, dtype): (absolute, relative). Data moves are compared bit by bit, not here.
    # Sums of up to a few thousand fp32 terms in another order; exp to 3e-7.
    ("attention", torch.float32): (5e-6, 2e-5),
    # The same fp32 arithmetic on the same inputs, then one rounding: at most one unit in the last
    # place apart, 2^-10 of the value for fp16 ...
    ("attention", torch.float16): (1e-5, 2.0**-10),
    # ... and 2^-7 for bf16.
    ("attention", torch.bfloat16): (1e-5, 2.0**-7),
    # On CUDA the tensor cores take 16-bit probabilities, as in FlashAttention: each is off by up to
    # 2^-12 (fp16) or 2^-9 (bf16) of itself, and V is normally distributed.
    ("attention on cuda", torch.float16): (2.0**-11, 2.0**-10),
    ("attention on cuda", torch.bfloat16): (2.0**-8, 2.0**-7),
    # Codes are exact in fp32. On CUDA the scales of K are folded into the query, which is rounded
    # to 16 bits again: logits are off by as much as if keys were rounded, up to 2^-9 of a product.
    ("attention to codes", torch.float16): (1e-5, 2.0**-10),
    ("attention to codes", torch.bfloat16): (1e-5, 2.0**-7),
    ("attention to codes on cuda", torch.float16): (2.0**-9, 2.0**-8),
    ("attention to codes on cuda", torch.bfloat16): (2.0**-6, 2.0**-6),
    ("statistics of codes", torch.float32): (1e-7, 1e-4),
    ("statistics of codes on cuda", torch.float32): (1e-4, 5e-2),
    ("entropy of codes", torch.float32): (2e-5, 1e-4),
    ("entropy of codes on cuda", torch.float32): (2e-3, 5e-2),
    ("echo of codes", torch.float32): (1e-7, 1e-4),
    ("echo of codes on cuda", torch.float32): (1e-4, 5e-2),
    # Logits of 500 carry fp32 errors of 3e-5 and more, which are relative errors of p.
    ("peaked attention", torch.float32): (3e-4, 1e-3),
    # Probabilities: an error of the logit is a relative error of p, and logits reach 30 here.
    ("statistics", torch.float32): (1e-7, 1e-4),
    # The same, as the difference of two logarithms.
    ("echo", torch.float32): (1e-7, 1e-4),
    ("peaked echo", torch.float32): (3e-4, 1e-3),
    # d(-p log p) is up to dp, and near p = 1 the value itself vanishes.
    ("entropy", torch.float32): (2e-5, 1e-4),
    # Square roots of sums of up to 256 squares.
    ("norm", torch.float32): (0.0, 1e-5),
    # Cosines: sums of unit vectors, then a product with another; of random keys the sum is short.
    ("likeness", torch.float32): (2e-6, 1e-5),
}


def unsupported(pages: Tensor) -> str | None:
    """What the statistics kernels on CUDA say of pages of a shape that they do not take."""
    head_size, block_size = pages.shape[2] // 2, pages.shape[1]
    if pages.device.type != "cuda":
        return None
    if head_size not in CUDA_HEAD_SIZES:
        return f"head size must be .* not {head_size}"
    if block_size < 8 or block_size & block_size - 1:
        return f"pages .*{block_size}.* power of two"
    return None


def page_starts(counts: Iterable[int]) -> tuple[Tensor, int]:
    """Where the candidate pages of each request begin, ``[R]`` int64, and how many pages there are:
    one that no request owns before each request's, and one after the last."""
    starts, end = [], 1
    for count in counts:
        starts.append(end)
        end += count + 1
    return torch.tensor(starts, dtype=torch.int64), end


@dataclasses.dataclass
class Request:
    """One row of a batch.

    Args:
        tail: tokens after the ``covered`` blocks; all tokens where nothing is packed.
        queries: new tokens, the last of the tail. 0 makes a padded row.
        packed: packed pages per head in (layer, head) order; ``None``: never compressed.
        covered: F.
    """

    tail: int
    queries: int = 1
    packed: Sequence[int] | None = None
    covered: int = 0


@dataclasses.dataclass
class Batch:
    """The arguments that describe rows, see ``ops/reference``; and what is behind them."""

    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    state_slot: Tensor
    num_pages: Tensor
    first_page: Tensor
    covered: Tensor
    query_start: Tensor
    free_blocks: list[int]
    page_scales: Tensor | None = None
    page_format: PageFormat = PageFormat.AUTO

    def rows(self) -> tuple[Any, ...]:
        return (self.block_table, self.seq_lens, *self.state())

    def state(self) -> tuple[Any, ...]:
        tables = (self.state_slot, self.num_pages, self.first_page, self.covered)
        return (*tables, self.page_scales, int(self.page_format))

    def owned(self) -> Tensor:
        """``[P, B]`` bool: places that hold a key of some request."""
        layers, heads = self.num_pages.shape[1:]
        slots, block_size = layers * heads, self.pages.shape[1]
        m = self.page_format.blocks_per_page
        owned = torch.zeros(self.pages.shape[:2], dtype=torch.bool)
        for r, (seq_len, slot) in enumerate(
            zip(self.seq_lens.tolist(), self.state_slot.tolist(), strict=True)
        ):
            for index in range(slots):
                packed = first = covered = 0
                if slot >= 0:
                    packed = int(self.num_pages[slot].flatten()[index])
                    first = int(self.first_page[slot].flatten()[index])
                    covered = int(self.covered[slot])
                n = layout.num_keys(seq_len, covered, packed, block_size, m)
                key = torch.arange(n)
                ids, within = layout.place(
                    self.block_table[r], covered, packed, first, index, slots, key, block_size, m
                )
                behind = key >= packed * m * block_size
                owned[ids[behind], within[behind]] = True
                owned[ids[~behind]] = True
        return owned

    def poisoned(self, value: float) -> Batch:
        """The same with ``value`` wherever nobody owns the memory."""
        pages = torch.where(self.owned()[..., None], self.pages, value)
        return dataclasses.replace(self, pages=pages)

    def to(self, device: str) -> Batch:
        moved = {
            f.name: value.to(device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor) and f.name != "block_table"
        }
        # .to would drop the gap between rows.
        wide = torch.full((self.block_table.shape[0], self.block_table.shape[1] + 3), POISON_ID)
        table = wide.to(self.block_table.dtype).to(device)[:, 1:-2]
        table.copy_(self.block_table)
        return dataclasses.replace(self, block_table=table, **moved)


def make_batch(
    requests: Sequence[Request],
    layers: int,
    heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    spare_blocks: int = 3,
    page_format: PageFormat = PageFormat.AUTO,
) -> Batch:
    """Rows with random K/V in what they own and NaN in all other memory, on the CPU. F of requests
    counts packed pages: times ``page_format.blocks_per_page`` it is in blocks."""
    requests = [
        dataclasses.replace(r, covered=r.covered * page_format.blocks_per_page) for r in requests
    ]
    slots = layers * heads
    tails = [-(-request.tail // block_size) for request in requests]
    packed = [sum(request.packed or ()) for request in requests]
    assert all(count % slots == 0 for count in packed)
    blocks = sum(tails) + sum(packed) // slots + spare_blocks
    ids = (torch.randperm(blocks) + 1).tolist()
    width = max([1, *(r.covered + t for r, t in zip(requests, tails, strict=True))])
    table = torch.full((len(requests), width + 3), POISON_ID, dtype=torch.int32)[:, 1:-2]
    states = sum(request.packed is not None for request in requests) + 2
    free_states = torch.randperm(states).tolist()
    num_pages = torch.full((states, layers, heads), POISON_ID, dtype=torch.int32)
    first_page = torch.full_like(num_pages, POISON_ID)
    covered = torch.full((states,), POISON_ID, dtype=torch.int32)
    state_slot = torch.full((len(requests),), layout.NOT_PACKED, dtype=torch.int32)
    seq_lens = torch.zeros(len(requests), dtype=torch.int32)
    for r, request in enumerate(requests):
        seq_lens[r] = request.covered * block_size + request.tail
        row = [ids.pop() for _ in range(packed[r] // slots)]
        row += [POISON_ID] * (request.covered - len(row))  # null blocks, which nothing reads
        row += [ids.pop() for _ in range(tails[r])]
        table[r, : len(row)] = torch.tensor(row, dtype=torch.int32)
        if request.packed is not None:
            slot = free_states.pop()
            state_slot[r] = slot
            num_pages[slot] = torch.tensor(request.packed).view(layers, heads)
            first_page[slot] = layout.exclusive_cumsum(num_pages[slot])
            covered[slot] = request.covered
    starts = torch.tensor([0, *(request.queries for request in requests)]).cumsum(0)
    pages = torch.randn((blocks + 1) * slots, block_size, 2 * head_size).to(dtype)
    batch = Batch(
        pages, table, seq_lens, state_slot, num_pages, first_page, covered, starts.int(), ids,
        page_format=page_format,
    )  # fmt: skip
    if page_format is not PageFormat.AUTO:
        _pack(batch, requests)
    return batch.poisoned(float("nan"))


def _pack(batch: Batch, requests: Sequence[Request]) -> None:
    """Random keys in the packed pages: of one head in one range, of no two channels in the same."""
    states, layers, heads = batch.num_pages.shape
    slots, channels = layers * heads, batch.pages.shape[2]
    page_format = batch.page_format
    shape = (states, layers, heads, *page_format.scales_shape(channels // 2))
    batch.page_scales = torch.full(shape, float("nan"), dtype=SCALE_DTYPE)
    codes = formats.packed_codes(batch.pages, page_format)
    for r, request in enumerate(requests):
        if request.packed is None:
            continue
        slot = int(batch.state_slot[r])
        for index, count in enumerate(request.packed):
            first = int(batch.first_page[slot].flatten()[index])
            ids = layout.page_id(
                batch.block_table[r], 0, count, first, index, slots, torch.arange(count)
            )
            keys = torch.randn(max(1, count) * codes.shape[1], channels)
            keys = keys * (0.5 + torch.rand(channels)) + torch.randn(channels) / 2
            keys = formats.to_stored(keys, page_format)
            scales = fitting.fit(keys, page_format)
            batch.page_scales[slot].flatten(0, 1)[index] = scales if count else float("nan")
            packed = formats.quantise(keys, scales, page_format)
            codes[ids] = packed.view(-1, *codes.shape[1:])[:count]


def fused_qkv(
    num_tokens: int, heads: int, group: int, head_size: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as slices of one projection, with NaN tokens before and after."""
    qkv = torch.full((num_tokens + 5, (group + 2) * heads * head_size), float("nan"), dtype=dtype)
    qkv[2 : 2 + num_tokens] = torch.randn(num_tokens, qkv.shape[1]).to(dtype)
    q, k, v = qkv.to(device)[2:].split(
        [group * heads * head_size, heads * head_size, heads * head_size], dim=-1
    )
    return (
        q.unflatten(-1, (group * heads, head_size)),
        k.unflatten(-1, (heads, head_size)),
        v.unflatten(-1, (heads, head_size)),
    )


def moved(arguments: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    """The same keyword arguments on a device."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }


def uneven(total: int, heads: int) -> list[int]:
    """``total`` pages over heads as unfairly as possible: some heads empty, one with most."""
    counts = [0] * heads
    counts[-1] = total if heads == 1 else total - total // 3
    if heads > 1:
        counts[heads // 2 - 1] += total // 3
    return counts


def bits(t: Tensor) -> Tensor:
    """The same memory as integers, so that NaN equals NaN and -0.0 differs from 0.0."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.cpu().contiguous().view(sizes[t.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    different = bits(actual) != bits(expected)
    assert not different.any(), f"{int(different.sum())} of {different.numel()} elements differ"


def assert_close(what: str, actual: Tensor, expected: Tensor) -> None:
    on_cuda = (f"{what} on cuda", expected.dtype)
    special = actual.is_cuda and on_cuda in TOLERANCES
    atol, rtol = TOLERANCES[on_cuda if special else (what, expected.dtype)]
    torch.testing.assert_close(actual.cpu(), expected.cpu(), atol=atol, rtol=rtol, equal_nan=True)
