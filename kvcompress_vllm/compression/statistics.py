# SPDX-License-Identifier: Apache-2.0
"""What is known of every candidate key: by the ops, and summed up over a prompt's chunks.

Letters as in ``cache/layout.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.compression.batch import Batch, Item, Rank
from kvcompress_vllm.records.plan import Accumulation, Observed


def measure(rank: Rank, batch: Batch[Item], channels: int) -> Tensor:
    """``[channels, units, B]`` fp32 of the candidates of a batch, one request after the other.

    Args:
        channels: mask; each op that has one of them runs, and its channels keep their order.
    """
    state, device = rank.state, rank.pages.device
    pages = (
        rank.pages,
        batch.rows,
        to_device([item.num_tokens for item in batch.items], torch.int32, device),
        batch.state_slot,
        *state.tables,
    )
    candidates = batch.covered, batch.unit_start, batch.num_units
    parts: list[Tensor] = []
    of_keys, stored = channels & ops.KEY_CHANNELS, channels & ops.STORED_CHANNELS
    if of_attention := channels & ~(of_keys | stored):  # refuses what nobody knows
        observed = batch.items[0].observed
        num_queries = [
            item.observed.num_queries
            if item.observed
            else min(batch.config.window, item.num_tokens)
            for item in batch.items
        ]
        parts.append(
            ops.attention_statistics(
                state.ring,
                *pages,
                to_device([item.observe_slot for item in batch.items], torch.int32, device),
                to_device(num_queries, torch.int32, device),
                *candidates,
                of_attention,
                observed.stride if observed else 1,
                rank.group.scale,
                **state.logits(),
            )
        )
    if of_keys:
        parts.append(ops.key_statistics(*pages, *candidates, of_keys))
    if stored:
        parts.append(_echo(rank, batch)[None])
    if not parts:
        shape = (0, batch.num_units, rank.group.block_size)
        return torch.empty(shape, dtype=torch.float32, device=device)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _echo(rank: Rank, batch: Batch[Item]) -> Tensor:
    """``[units, B]`` echo scores of the candidates, zero where a key never got one.

    What was never written is cleared, not masked: it moves with the keys.

    Raises:
        RuntimeError: nobody stored any.
    """
    scores = rank.state.echo
    if scores is None:
        raise RuntimeError("kv_compress: no echo scores are stored for this policy")
    block_size = rank.group.block_size
    blank = [
        (*divmod(position, block_size), item.old_blocks)
        for item in batch.items
        for start, end in item.unscored
        for position in range(start, end)
    ]
    if blank:
        by_block = scores.view(-1, rank.group.pages_per_block, scores.shape[1]).transpose(1, 2)
        place = [[blocks[index] for index, _, blocks in blank], [offset for _, offset, _ in blank]]
        places = to_device(place, torch.int64, scores.device)
        # A zero of the device: see transfer.
        by_block.index_put_((places[0], places[1]), scores.new_zeros(1))
    units, _ = _units(rank, batch.items, batch.rows)
    return scores.view(-1, block_size)[units]


def add_up(
    rank: Rank, item: Accumulation, row: Tensor, statistics: Tensor, store: bool = True
) -> Tensor:
    """Add the statistics of the observed queries to the accumulated ones of a request.

    Args:
        row: ``[M]`` int32 block ids.
        statistics: ``[channels, units, B]`` of this request, those of the attention alone; become
            the sums.
        store: False leaves the accumulated statistics as they are.

    Returns:
        ``[units, B]`` fp32, how many queries saw each key.

    Raises:
        RuntimeError: there are none.
    """
    accumulated, observed = rank.state.accumulated, item.observed
    if accumulated is None or observed is None:
        raise RuntimeError(f"kv_compress: {item.request_id} has no accumulated statistics")
    accumulated = accumulated.view(-1, rank.group.block_size, accumulated.shape[2])
    units, ages, known = _candidates(rank, item, row, observed)
    seen = ages.div(observed.stride, rounding_mode="floor") + 1
    counts = seen.clamp(max=observed.num_queries).float()
    before = accumulated[units].masked_fill_(~known[:, None, None], 0)
    counts += before[..., -1]
    for channel, values in enumerate(statistics):
        values += before[..., channel]
    if not store:
        return counts
    sums = torch.zeros_like(before)
    sums[..., -1] = counts
    sums[..., : len(statistics)] = statistics.permute(1, 2, 0)
    accumulated[units] = sums
    return counts


def _candidates(
    rank: Rank, item: Accumulation, row: Tensor, observed: Observed
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a request's candidates, in the order of the statistics op.

    Returns:
        ``[units]`` as of :func:`_units`; ``[units, B]`` tokens after each key, a lower bound for
        keys that were packed before; ``[units]`` bool, whether a unit has accumulated statistics.
    """
    device, block_size = rank.pages.device, rank.group.block_size
    units, block = _units(rank, [item], row[None])
    position = block[:, None] * block_size + torch.arange(block_size, device=device)
    return units, item.num_tokens - 1 - position, block < observed.known


def _units(rank: Rank, items: Sequence[Accumulation], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of the candidates of all requests, in the order of the statistics ops: ``[units]`` place of
    each unit in what is stored by key, as many of B keys as a page has room for; and the block of
    each in its row's own count: packed units stand for some block before them.

    Args:
        rows: ``[R, M]`` int32 block ids.
    """
    state, device = rank.state, rank.pages.device
    heads, m = rank.group.pages_per_block, rank.group.blocks_per_page
    numbers = [
        (item.packed_slot if item.old_kept else 0, item.old_kept > 0, item.old_covered,
         item.covered - item.old_covered, row * rows.shape[1])
        for row, item in enumerate(items)
    ]  # fmt: skip
    table = to_device(numbers, torch.int64, device)
    slot, was_packed, covered, fresh, start = table.unsqueeze(-1).unbind(1)
    # A slot that was never packed holds anything.
    packed = (state.num_pages[slot[:, 0]].flatten(1) * was_packed).flatten()
    first = (state.first_page[slot[:, 0]].flatten(1) * was_packed).flatten()
    counts = (packed.view(-1, heads) * m + fresh).flatten()
    # One line of (request, head) pairs, as many units each as it has candidates:
    #
    #     pair      0         1         2
    #     unit      p p t t   p t t     t t          p: packed, m to a page; t: of the tail
    #     begin     0         4         7
    total = sum(rank.candidate_units(item) for item in items) * heads
    pair = torch.arange(counts.shape[0], device=device)
    pair = pair.repeat_interleave(counts, output_size=total)
    request, head = pair.div(heads, rounding_mode="floor"), pair.remainder(heads)
    unit = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[pair]
    packed, covered = packed[pair], covered.flatten()[request]
    behind = unit - packed * m
    is_packed = behind < 0
    page = torch.where(is_packed, unit.div(m, rounding_mode="floor"), packed + behind)
    pages = layout.page_id(
        rows.flatten(), covered, packed, first[pair], head, heads, page, start.flatten()[request]
    )
    within = torch.where(is_packed, unit.remainder(m), 0)
    block = torch.where(is_packed, covered - 1, covered + behind)
    return pages * m + within, block
