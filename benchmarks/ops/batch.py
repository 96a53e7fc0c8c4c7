# SPDX-License-Identifier: Apache-2.0
"""A decode batch over ragged heads: bf16, 8 KV heads of 128 with 4 query heads each, blocks of 16
tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout

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

    def check(self, layer: int = 0, samples: int = 32) -> None:
        """Some heads of one layer against plain PyTorch."""
        self.out.fill_(float("nan"))
        self.run(layer)
        table, lengths = self.sequences(layer)
        query, out = (t.view(-1, GROUP, HEAD_SIZE) for t in (self.query, self.out))
        last = len(lengths) - 1
        for i in {0, last, *torch.randint(last + 1, (samples,)).tolist()}:
            n = int(lengths[i])
            kv = self.pages[table[i, : -(-n // BLOCK_SIZE)].long()].flatten(0, 1)[:n].float()
            key, value = kv.split(HEAD_SIZE, dim=1)
            want = (query[i].float() @ key.t() * SCALE).softmax(-1) @ value
            torch.testing.assert_close(out[i].float(), want, atol=2**-8, rtol=2**-7)

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
