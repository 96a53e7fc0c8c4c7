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
from kvcompress_vllm.cache.page_format import PageFormat, dequantise, packed_codes

HEAD_SIZE, BLOCK_SIZE, HEADS, GROUP = 128, 16, 8, 4
SCALE = HEAD_SIZE**-0.5


def random_pages(count: int, device: torch.device) -> Tensor:
    """``[count, B, 2 * D]`` bf16."""
    shape = (count, BLOCK_SIZE, 2 * HEAD_SIZE)
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()


class Decode:
    """Heads hold log-normal numbers of packed pages, ``mean`` keys on average. Every request has
    ``tokens`` new ones: its next, and what is drafted behind it.

    It has as many layers as it takes for the keys to be several times the L2 cache.
    """

    def __init__(
        self,
        requests: int,
        mean: int,
        sigma: float,
        device: torch.device,
        least_bytes: int = 1 << 30,
        page_format: PageFormat = PageFormat.AUTO,
        tokens: int = 1,
    ) -> None:
        torch.manual_seed(requests + mean)
        self.tokens = tokens
        self.requests, self.device, self.page_format = requests, device, page_format
        m, page_keys = page_format.blocks_per_page, page_format.keys_per_page(BLOCK_SIZE)
        per_layer = requests * HEADS * mean * page_format.key_bytes(HEAD_SIZE)
        self.layers = max(1, min(32, -(-least_bytes // per_layer)))
        slots = self.layers * HEADS
        spread = (torch.randn(requests, slots) * sigma - sigma**2 / 2).exp()
        target = (spread * mean / page_keys).round().clamp(1, 8192).int()
        blocks = -(-target.sum(1) // slots)
        target[:, -1] += (blocks * slots - target.sum(1)).int()
        self.num_pages = target.view(requests, self.layers, HEADS)
        self.first_page = layout.exclusive_cumsum(self.num_pages)
        self.covered = (blocks * m).int()
        tail = torch.randint(tokens, BLOCK_SIZE + 1, (requests,))
        self.keys = self.num_pages * page_keys + tail.view(-1, 1, 1)
        # What lies in pages is as large in every format.
        rows = self.num_pages * BLOCK_SIZE + tail.view(-1, 1, 1)
        heads = requests * HEADS
        self.bytes = int(rows.sum()) * 4 * HEAD_SIZE / self.layers
        self.bytes += heads * page_format.scales_bytes(HEAD_SIZE)
        total = int(blocks.sum()) + requests + 1
        order = (torch.randperm(total - 1) + 1).int()
        self.table = torch.zeros(requests, int(blocks.max()) * m + 1, dtype=torch.int32)
        tails = []
        for row, part, covered in zip(
            self.table, order.split((blocks + 1).tolist()), self.covered.tolist(), strict=True
        ):
            row[: len(part) - 1], row[covered] = part[:-1], part[-1]
            tails.append(int(part[-1]))
        self.pages = random_pages(total * slots, device)
        seq_lens = (self.covered * BLOCK_SIZE + tail).int()
        state_slot = torch.arange(requests, dtype=torch.int32)
        tables = (state_slot, self.num_pages, self.first_page, self.covered)
        self.scales = page_format.new_scales(requests, self.layers, HEADS, HEAD_SIZE, device)
        if self.scales is not None:
            self._fill_codes(torch.tensor(tails, device=device), slots)
        moved = [t.to(device) for t in (self.table, seq_lens, *tables)]
        self.rows = [*moved, self.scales, int(page_format)]
        self.start = torch.arange(requests + 1, dtype=torch.int32, device=device) * tokens
        shape = (requests * tokens, HEADS * GROUP, HEAD_SIZE)
        self.query = torch.randn(shape, device=device).bfloat16()
        self.out = torch.empty_like(self.query)

    def _fill_codes(self, tails: Tensor, slots: int) -> None:
        """Codes of small numbers, of any kind, outside the tails; scales of another size each."""
        assert self.scales is not None
        kept = self.pages.view(-1, slots, BLOCK_SIZE, 2 * HEAD_SIZE)[tails]
        codes = self.pages.view(torch.uint8)
        codes.random_(0, 256)
        if self.page_format is PageFormat.FP8:
            codes.bitwise_and_(0xBF)
        self.pages.view(-1, slots, BLOCK_SIZE, 2 * HEAD_SIZE)[tails] = kept
        self.scales.normal_()
        self.scales[:, :, :, 0].uniform_(0.1, 0.4)
        if self.page_format is PageFormat.INT4:
            self.scales.div_(HEAD_SIZE**0.5)  # the rotation makes them longer again

    def run(self, layer: int) -> None:
        ops.paged_attention(
            self.query, self.pages, *self.rows, self.start, layer, SCALE, self.out,
            decode_query_len=self.tokens,
        )  # fmt: skip

    def steps(self) -> list[Callable[[], None]]:
        return [partial(self.run, layer) for layer in range(self.layers)]

    def check(self, layer: int = 0, samples: int = 32) -> None:
        """Some heads of one layer against plain PyTorch."""
        self.out.fill_(float("nan"))
        self.run(layer)
        if self.scales is not None:
            self._check_codes(layer, samples)
            return
        table, lengths = self.sequences(layer)
        shape = self.requests, self.tokens, HEADS, GROUP, HEAD_SIZE
        query, out = (t.view(shape).transpose(1, 2).flatten(0, 1) for t in (self.query, self.out))
        last = len(lengths) - 1
        for i in {0, last, *torch.randint(last + 1, (samples,)).tolist()}:
            n = int(lengths[i])
            kv = self.pages[table[i, : -(-n // BLOCK_SIZE)].long()].flatten(0, 1)[:n].float()
            for token in range(self.tokens):
                key, value = kv[: n - self.tokens + 1 + token].split(HEAD_SIZE, dim=1)
                want = (query[i, token].float() @ key.t() * SCALE).softmax(-1) @ value
                torch.testing.assert_close(out[i, token].float(), want, atol=2**-8, rtol=2**-7)

    def _check_codes(self, layer: int, samples: int) -> None:
        """The same where keys are codes."""
        slots, format_ = self.layers * HEADS, self.page_format
        query, out = (t.view(-1, GROUP, HEAD_SIZE) for t in (self.query, self.out))
        last = self.requests * HEADS - 1
        codes = packed_codes(self.pages, format_)
        for i in {0, last, *torch.randint(last + 1, (samples,)).tolist()}:
            r, head = divmod(i, HEADS)
            packed, first = (int(t[r, layer, head]) for t in (self.num_pages, self.first_page))
            count = int(self.keys[r, layer, head])
            page, within = layout.place(
                self.table[r], int(self.covered[r]), packed, first, layer * HEADS + head, slots,
                torch.arange(count), BLOCK_SIZE, format_.blocks_per_page,
            )  # fmt: skip
            page, within = page.to(self.device), within.to(self.device)
            n = packed * format_.keys_per_page(BLOCK_SIZE)
            assert self.scales is not None
            kv = torch.cat([
                dequantise(codes[page[:n], within[:n]], self.scales[r, layer, head], format_),
                self.pages[page[n:], within[n:]].float(),
            ])  # fmt: skip
            key, value = kv.split(HEAD_SIZE, dim=1)
            want = (query[i].float() @ key.t() * SCALE).softmax(-1) @ value
            torch.testing.assert_close(out[i].float(), want, atol=2**-5, rtol=2**-5)

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
