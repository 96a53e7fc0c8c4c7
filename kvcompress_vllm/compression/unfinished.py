# SPDX-License-Identifier: Apache-2.0
"""Observed queries of segments that are not complete, kept in blocks of the KV cache for whoever
goes on there. Letters as in ``cache/layout.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.compression.batch import Rank
from kvcompress_vllm.records.plan import SavedQueries


def save(rank: Rank, items: Sequence[SavedQueries]) -> None:
    """Copy queries from observation slots into blocks of the cache, bit by bit."""
    for item, index in zip(items, _indices(rank, items), strict=True):
        queries = _of_ring(rank, item)
        blocks, each = _blocks(rank), len(item.blocks) // len(queries)
        padded = blocks.new_zeros(len(queries), each * blocks.shape[1])
        padded[:, : queries.shape[1]] = queries
        blocks[index] = padded.view(-1, blocks.shape[1])


def load(rank: Rank, items: Sequence[SavedQueries]) -> None:
    """Copy them back into observation slots."""
    ring, size = rank.state.ring, rank.group.block_size
    for item, index in zip(items, _indices(rank, items), strict=True):
        place = item.first % rank.state.window
        found = _blocks(rank)[index].view(item.num_tokens // size, -1)
        shape = ring.shape[0], size, *ring.shape[3:]
        queries = found[:, : ring[:, 0, :size].numel()].unflatten(1, shape)
        ring[:, item.observe_slot, place : place + item.num_tokens] = queries.transpose(
            0, 1
        ).flatten(1, 2)


def _of_ring(rank: Rank, item: SavedQueries) -> Tensor:
    """``[num_tokens / B, L * B * H * G * D]``: the queries of each B tokens of all layers."""
    place = item.first % rank.state.window
    found = rank.state.ring[:, item.observe_slot, place : place + item.num_tokens]
    parts: Tensor = found.unflatten(1, (-1, rank.group.block_size))
    return parts.transpose(0, 1).flatten(1)


def _blocks(rank: Rank) -> Tensor:
    """``[N, L * H * B * 2 * D]``: the pages of each block."""
    pages: Tensor = rank.pages
    return pages.view(-1, rank.group.pages_per_block * pages[0].numel())


def _indices(rank: Rank, items: Sequence[SavedQueries]) -> tuple[Tensor, ...]:
    """The blocks of each."""
    if not items:
        return ()
    blocks = [block for item in items for block in item.blocks]
    index = to_device(blocks, torch.int64, rank.pages.device)
    parts: tuple[Tensor, ...] = index.split([len(item.blocks) for item in items])
    return parts
