# SPDX-License-Identifier: Apache-2.0
"""What a worker knows of packed requests. Letters as in ``cache/layout.py``.

Life of a state slot, whose number the scheduler hands out:

1. free: no block names it in ``owner``;
2. :meth:`PackedState.install` after a compression: the tables describe the request, and ``owner``
   of its first packed block names the slot, which is how attention finds it from a row;
3. :meth:`PackedState.release` when the request finished or was preempted, before any other request
   can use its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.records.group import CacheGroup

ACCUMULATED = 4
"""Numbers per key in the accumulated statistics: 16 bytes, which the compaction kernel moves at
once."""


Tables = tuple[Tensor, Tensor, Tensor, Tensor | None, int]
"""What the ops take after the state slots: :attr:`PackedState.tables`."""


class Logits(TypedDict):
    """How logits are changed between product and softmax: keyword arguments of the ops."""

    soft_cap: float
    sink_logits: Tensor | None


def stacked_sinks(sinks: Sequence[Tensor | None]) -> Tensor | None:
    """``[L, H * G]`` fp32 learnt sinks of all layers, -inf in those that have none; None: no layer
    has any."""
    found = next((each for each in sinks if each is not None), None)
    if found is None:
        return None
    none = torch.full_like(found, -math.inf, dtype=torch.float32)
    return torch.stack([none if each is None else each.detach().float() for each in sinks])


class PackedState:
    """State tables, block owners and the observation ring of one rank and cache group.

    Attributes:
        group: whose layers, heads and blocks these are.
        num_pages, first_page: ``[U, L, H]`` int32.
        covered: ``[U]`` int32.
        page_scales: ``[U, L, H, A, S]`` bf16, their scales; None where they have none.
        owner: ``[N]`` int32, state slot of the request whose row starts with this block, or -1.
        ring: ``[L, O, W, H * G, D]`` observed queries; zeros in draft layers.
        accumulated: ``[P, T, 4]`` fp32 or None: per key, for policies that judge by all queries,
            the sums so far of their channels (at most three) and, last, how many queries were
            counted. Written for pages of one request only: it computed them itself, and nobody who
            shares them writes here.
        echo: ``[P, T]`` fp32 or None: per key, the scores of ``ops.echo_scores``. Of a block that
            the prefix cache hands to others they are valid where the scheduler says so
            (``scheduling/segments.py``); where a request wrote none, zeroed before they are read.
        sink_logits: ``[L, H * G]`` fp32 or None: the learnt sinks of the layers, where there are.
    """

    def __init__(
        self,
        group: CacheGroup,
        *,
        num_blocks: int,
        state_slots: int,
        observe_slots: int,
        window: int,
        dtype: torch.dtype,
        device: torch.device,
        accumulated: bool = False,
        echo: bool = False,
        sink_logits: Tensor | None = None,
    ) -> None:
        self.group = group
        heads = (state_slots, *group.shape)
        self.num_pages = torch.zeros(heads, dtype=torch.int32, device=device)
        self.first_page = torch.zeros(heads, dtype=torch.int32, device=device)
        self.covered = torch.zeros(state_slots, dtype=torch.int32, device=device)
        self.owner = torch.full((num_blocks,), layout.NOT_PACKED, dtype=torch.int32, device=device)
        self.ring = torch.zeros(
            group.layers,
            observe_slots,
            window,
            group.heads * group.queries_per_head,
            group.head_size,
            dtype=dtype,
            device=device,
        )
        self.page_scales = group.page_format.new_scales(*heads, group.head_size, device)
        keys = group.num_pages(num_blocks), group.page_keys
        self.accumulated: Tensor | None = None
        if accumulated:
            self.accumulated = torch.zeros(*keys, ACCUMULATED, dtype=torch.float32, device=device)
        self.echo: Tensor | None = None
        if echo:
            self.echo = torch.zeros(keys, dtype=torch.float32, device=device)
        self.sink_logits = sink_logits
        self._first_block: dict[int, int] = {}

    @property
    def page_format(self) -> PageFormat:
        """Of packed pages."""
        return self.group.page_format

    @property
    def window(self) -> int:
        """W, queries that an observation slot holds."""
        return self.ring.shape[2]

    @property
    def tables(self) -> Tables:
        """``num_pages``, ``first_page``, ``covered``, ``page_scales`` and ``page_format``: what the
        ops take after the state slots."""
        tables = self.num_pages, self.first_page, self.covered
        return *tables, self.page_scales, int(self.page_format)

    def logits(self, layer: int | None = None) -> Logits:
        """What the ops that turn products into probabilities take by name, of one layer or all."""
        sinks = self.sink_logits
        if sinks is not None and layer is not None:
            sinks = sinks[layer]
        return {"soft_cap": self.group.soft_cap, "sink_logits": sinks}

    @property
    def slots(self) -> dict[int, int]:
        """Live state slots and the first packed block of each."""
        return dict(self._first_block)

    def num_bytes(self) -> int:
        """Memory beside the KV cache, in bytes."""
        tensors = [self.num_pages, self.first_page, self.covered, self.owner, self.ring]
        further = (self.page_scales, self.accumulated, self.echo, self.sink_logits)
        tensors += [tensor for tensor in further if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def state_slots(self, block_table: Tensor) -> Tensor:
        """``[R]`` int32 state slot of every row of ``block_table`` ``[R, M]``; -1: not packed."""
        return self.owner[block_table[:, 0].long()]

    def slot_of(self, blocks: list[int]) -> int:
        """State slot of the row that starts with ``blocks``, or -1; without asking the device."""
        return next((s for s, b in self._first_block.items() if b == blocks[0]), layout.NOT_PACKED)

    def install(
        self,
        slots: list[int],
        blocks: list[list[int]],
        covered: list[int],
        kept_pages: Tensor,
        new_scales: Tensor | None = None,
    ) -> None:
        """Describe requests that were just compressed.

        Args:
            slots: state slots, one per request.
            blocks: packed blocks of every request.
            covered: F of every request.
            kept_pages: ``[R, L, H]`` int32.
            new_scales: ``[R, L, H, A, S]`` of their packed pages, where those have scales.

        Raises:
            RuntimeError: a request has no packed block, or no scales though its pages need them.
        """
        if self.page_scales is not None and new_scales is None:
            raise RuntimeError(f"kv_compress: pages of {self.page_format.label} without scales")
        self.release(slots)
        for slot, row in zip(slots, blocks, strict=True):
            if not row:
                raise RuntimeError(f"kv_compress: state slot {slot} has no packed block")
            self._first_block[slot] = row[0]
        device = self.owner.device
        index = to_device(slots, torch.int64, device)
        self.num_pages[index] = kept_pages
        self.first_page[index] = layout.exclusive_cumsum(kept_pages)
        if self.page_scales is not None and new_scales is not None:
            self.page_scales[index] = new_scales
        self.covered[index] = to_device(covered, torch.int32, device)
        first = to_device([row[0] for row in blocks], torch.int64, device)
        self.owner[first] = index.to(torch.int32)

    def release(self, slots: list[int]) -> None:
        """Forget the requests in ``slots``; a slot that holds none is fine."""
        blocks = [self._first_block.pop(slot) for slot in slots if slot in self._first_block]
        if blocks:
            first = to_device(blocks, torch.int64, self.owner.device)
            self.owner.index_fill_(0, first, layout.NOT_PACKED)  # waits for nothing: see transfer
