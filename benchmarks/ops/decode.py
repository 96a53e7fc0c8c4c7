# SPDX-License-Identifier: Apache-2.0
"""A decode batch over ragged heads, for us and for FlashAttention 3."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.timing import seconds
from kvcompress_vllm import layout, ops

HEAD_SIZE, BLOCK_SIZE, HEADS, GROUP = 128, 16, 8, 4
SCALE = HEAD_SIZE**-0.5


def random_pages(count: int, device: torch.device) -> Tensor:
    """``[count, B, 2 * D]`` bf16."""
    shape = (count, BLOCK_SIZE, 2 * HEAD_SIZE)
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()


class Decode:
    """Heads hold log-normal numbers of packed pages, ``mean`` keys on average.

    It has as many layers as it takes for the keys to be several times the L2 cache.
    """

    def __init__(
        self,
        requests: int,
        mean: int,
        sigma: float,
        device: torch.device,
        least_bytes: int = 1 << 30,
    ) -> None:
        torch.manual_seed(requests + mean)
        self.requests, self.device = requests, device
        per_layer = requests * HEADS * mean * 4 * HEAD_SIZE
        self.layers = max(1, min(32, -(-least_bytes // per_layer)))
        slots = self.layers * HEADS
        spread = (torch.randn(requests, slots) * sigma - sigma**2 / 2).exp()
        target = (spread * mean / BLOCK_SIZE).round().clamp(1, 8192).int()
        blocks = -(-target.sum(1) // slots)
        target[:, -1] += (blocks * slots - target.sum(1)).int()
        self.num_pages = target.view(requests, self.layers, HEADS)
        self.first_page = layout.exclusive_cumsum(self.num_pages)
        self.covered = blocks.int()
        tail = torch.randint(1, BLOCK_SIZE + 1, (requests,))
        self.keys = self.num_pages * BLOCK_SIZE + tail.view(-1, 1, 1)
        self.bytes = int(self.keys.sum()) * 4 * HEAD_SIZE / self.layers
        total = int(blocks.sum()) + requests + 1
        order = (torch.randperm(total - 1) + 1).int()
        self.table = torch.zeros(requests, int(blocks.max()) + 1, dtype=torch.int32)
        for row, part in zip(self.table, order.split((blocks + 1).tolist()), strict=True):
            row[: len(part)] = part
        self.pages = random_pages(total * slots, device)
        seq_lens = (blocks * BLOCK_SIZE + tail).int()
        state_slot = torch.arange(requests, dtype=torch.int32)
        state = (state_slot, self.num_pages, self.first_page, self.covered)
        self.rows = [t.to(device) for t in (self.table, seq_lens, *state)]
        self.start = torch.arange(requests + 1, dtype=torch.int32, device=device)
        shape = (requests, HEADS * GROUP, HEAD_SIZE)
        self.query = torch.randn(shape, device=device).bfloat16()
        self.out = torch.empty_like(self.query)

    def run(self, layer: int) -> None:
        ops.paged_attention(self.query, self.pages, *self.rows, self.start, layer, SCALE, self.out)

    def steps(self) -> list[Callable[[], None]]:
        return [partial(self.run, layer) for layer in range(self.layers)]

    def sequences(self, layer: int) -> tuple[Tensor, Tensor]:
        """Page table and lengths of the layer when every (request, head) is a sequence."""
        slots = self.layers * HEADS
        num_pages = self.num_pages[:, layer].reshape(-1, 1)
        first = self.first_page[:, layer].reshape(-1, 1)
        j = torch.arange(int(num_pages.max()) + 1).view(1, -1)
        row = torch.arange(self.requests).repeat_interleave(HEADS).view(-1, 1)
        head = (layer * HEADS + torch.arange(HEADS)).repeat(self.requests).view(-1, 1)
        packed = j < num_pages
        index = torch.where(packed, (first + j) // slots, self.covered[row])
        slot = torch.where(packed, (first + j) % slots, head)
        table = self.table[row, index.long().clamp_max(self.table.shape[1] - 1)] * slots + slot
        lengths = self.keys[:, layer].reshape(-1)
        return table.int().to(self.device), lengths.int().to(self.device)


def load_flash() -> Callable[..., Tensor] | None:
    """vLLM's FlashAttention 3; None where it is missing or does not run."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface as interface
    except ImportError:
        return None
    if not interface.is_fa_version_supported(3):
        return None
    return partial(interface.flash_attn_varlen_func, fa_version=3)


def compare_flash(case: Decode, flash: Callable[..., Tensor]) -> str:
    """Time of FlashAttention on the same pages, and how far its output is from ours."""
    query = case.query.view(-1, GROUP, HEAD_SIZE)
    out = torch.empty_like(query)
    keys = case.pages[..., :HEAD_SIZE].unsqueeze(2)
    values = case.pages[..., HEAD_SIZE:].unsqueeze(2)
    start = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=case.device)
    layers = min(case.layers, 8)
    steps = []
    for layer in range(layers):
        table, lengths = case.sequences(layer)
        step = partial(
            flash,
            query,
            keys,
            values,
            max_seqlen_q=1,
            cu_seqlens_q=start,
            max_seqlen_k=int(lengths.max()),
            seqused_k=lengths,
            block_table=table,
            softmax_scale=SCALE,
            causal=True,
            out=out,
            num_splits=1 if query.shape[0] > 992 else 0,  # it balances splits up to here
        )
        steps.append(step)
    time = seconds(steps, 7)
    case.run(layers - 1)
    error = float((out.view_as(case.out).float() - case.out.float()).abs().max())
    return f"FA3 {time * 1e6:.1f} us, differs by {error:.0e}"
