# SPDX-License-Identifier: Apache-2.0
"""Where the keys of one (request, layer, head) are. Letters as in ``cache/layout.py``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout, page_format
from kvcompress_vllm.cache.page_format import PageFormat


class State(NamedTuple):
    """The state tables, and the format of the packed pages that they describe."""

    num_pages: Tensor
    first_page: Tensor
    covered: Tensor
    page_scales: Tensor | None
    page_format: int

    def head(self, row: Tensor, slot: int, layer: int, head: int) -> Head:
        """The head of the request with a row of the block table and a state slot, or -1.

        Raises:
            RuntimeError: there is no such format, or its scales are missing.
        """
        if self.page_format not in list(PageFormat):
            raise RuntimeError(f"page_format is {self.page_format}, not one of {[*PageFormat]}")
        if self.page_format and self.page_scales is None:
            raise RuntimeError(f"page_format {self.page_format} needs page_scales")
        layers, heads = self.num_pages.shape[1:]
        packed = first = covered = 0
        scales = None
        if slot >= 0:
            packed, first = (int(t[slot, layer, head]) for t in (self.num_pages, self.first_page))
            covered = int(self.covered[slot])
            if self.page_scales is not None:
                scales = self.page_scales[slot, layer, head]
        return Head(
            row, packed, first, covered, layer * heads + head, layers * heads, scales,
            PageFormat(self.page_format),
        )  # fmt: skip


class Head(NamedTuple):
    """One head of one request."""

    row: Tensor
    """``[M]`` block ids."""
    packed: int
    """Its packed pages."""
    first: int
    """The first of them."""
    covered: int
    """F."""
    slot: int
    """``l * H + h``."""
    slots: int
    """``L * H``."""
    scales: Tensor | None
    """``[A, S]``."""
    format: PageFormat

    @property
    def blocks_per_page(self) -> int:
        """m."""
        return self.format.blocks_per_page

    def num_keys(self, seq_len: int, block_size: int) -> int:
        """K/V vectors that it holds for a request of ``seq_len`` tokens."""
        return layout.num_keys(seq_len, self.covered, self.packed, block_size, self.blocks_per_page)

    def candidates(self, start: int, new_covered: int, block_size: int) -> tuple[int, int]:
        """Where the output for its candidate keys begins, and how many they are.

        Args:
            start: first output page of the request.
        """
        fresh = new_covered - self.covered
        page = start + layout.first_candidate(self.first, self.slot, fresh, self.blocks_per_page)
        return page * block_size, (self.packed * self.blocks_per_page + fresh) * block_size

    def place(self, key: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """``[n]`` page ids of keys, and which key of the page each is."""
        return layout.place(
            self.row, self.covered, self.packed, self.first, self.slot, self.slots, key,
            block_size, self.blocks_per_page,
        )  # fmt: skip

    def read(self, pages: Tensor, key: Tensor, stored: bool = False) -> Tensor:
        """``[n, 2 * D]``: K and V of some keys, as numbers: fp32 where packed pages hold codes.

        Args:
            stored: as :func:`page_format.to_stored` has them.
        """
        block_size = pages.shape[1]
        page, within = self.place(key, block_size)
        if self.format is PageFormat.AUTO:
            return pages[page, within]
        packed = key < self.packed * self.format.keys_per_page(block_size)
        values = torch.empty(len(key), pages.shape[2], dtype=torch.float32, device=pages.device)
        plain = pages[page[~packed], within[~packed]].float()
        values[~packed] = page_format.to_stored(plain, self.format) if stored else plain
        if self.scales is not None and self.packed:
            codes = page_format.packed_codes(pages, self.format)[page[packed], within[packed]]
            of = page_format.decode if stored else page_format.dequantise
            values[packed] = of(codes, self.scales, self.format)
        return values

    def keys(self, pages: Tensor, seq_len: int) -> Tensor:
        """The same of everything that it holds, packed pages first."""
        n = self.num_keys(seq_len, pages.shape[1])
        return self.read(pages, torch.arange(n, device=pages.device))


def capped(logits: Tensor, soft_cap: float) -> Tensor:
    """``soft_cap * tanh(x / soft_cap)`` of each logit x, as Gemma 2 squeezes them; 0 leaves all.

    Raises:
        RuntimeError: it is negative, or no number.
    """
    if not 0 <= soft_cap < math.inf:
        raise RuntimeError(f"soft_cap must be 0 (none) or positive, not {soft_cap}")
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def with_sinks(logits: Tensor, sink_logits: Tensor | None, head: int) -> Tensor:
    """``[G, Q, n + 1]``: each query head's sink behind its logits ``[G, Q, n]``.

    Args:
        sink_logits: ``[H * G]``; None leaves the logits as they are.
    """
    if sink_logits is None:
        return logits
    group, queries, _ = logits.shape
    of_heads = sink_logits[head * group : (head + 1) * group]
    return torch.cat([logits, of_heads[:, None, None].expand(-1, queries, 1)], dim=-1)


def check_sinks(sink_logits: Tensor | None, *shape: int) -> None:
    """Refuse sinks that are not ``shape`` in fp32.

    Raises:
        RuntimeError: what they are.
    """
    if sink_logits is None:
        return
    if sink_logits.shape != shape or sink_logits.dtype is not torch.float32:
        found = f"{list(sink_logits.shape)} in {sink_logits.dtype}"
        raise RuntimeError(f"sink_logits must be {list(shape)} in float32, not {found}")


def hidden_keys(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """``[num_queries, num_keys]`` bool: True where causality hides the key; ends aligned."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.triu(num_keys - num_queries + 1)
