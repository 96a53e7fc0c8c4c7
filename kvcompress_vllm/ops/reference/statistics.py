# SPDX-License-Identifier: Apache-2.0
"""What observed queries paid to keys, and what keys and values are."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from kvcompress_vllm.ops.channels import (
    ATTENTION_CHANNELS,
    CHANNELS,
    ENTROPY,
    HEAD_SUM_SQUARES,
    KEY_CHANNELS,
    LAST,
    LIKENESS,
    LOW_COUNT,
    MEAN_SQUARES,
    NORM,
    SUM,
    SUM_SQUARES,
    VALUE_NORM,
)
from kvcompress_vllm.ops.reference.rows import State, capped, check_sinks, with_sinks


def attention_statistics(
    ring: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    page_scales: Tensor | None,
    page_format: int,
    observe_slot: Tensor,
    num_queries: Tensor,
    new_covered: Tensor,
    page_start: Tensor,
    num_candidate_pages: int,
    channels: int,
    query_stride: int,
    scale: float,
    *,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """What observed queries of each request paid to each key, over all layers and heads.

    With ``p[q, g, k]`` the causal softmax of observed query q of group member g over all keys of
    the head (tail included), its logits capped and its sink in the sum as for
    :func:`~kvcompress_vllm.ops.reference.attention.paged_attention`, per candidate key:

        SUM               sum over q, g of p
        SUM_SQUARES       sum over q, g of p^2
        HEAD_SUM_SQUARES  sum over g of (sum over q of p)^2
        LOW_COUNT         how many q have mean over g of p < 1 / (keys that q sees)
        MEAN_SQUARES      sum over q of (mean over g of p)^2
        ENTROPY           sum over q, g of -p log p, in nats
        LAST              sum over g of p, for the last query alone
        MAXIMUM           the highest p of any q and g

    Candidates are the keys of the packed pages, then those of the full tail blocks up to
    ``new_covered``, in output pages of B keys (a packed page takes m). Those of (r, l, h) start at
    output page ``page_start[r] + first_page * m + (l * H + h) * (new_covered - covered)``.

    Args:
        ring: ``[L, O, W, H * G, D]``; the query of position x is at ``[:, slot, (x // query_stride)
            % W]``. Positions a stride apart are neighbours there, so W of them never collide.
        observe_slot: ``[R]`` int32.
        num_queries: ``[R]`` int32, n <= W: query i of n is the one at position
            ``seq_lens - 1 - (n - 1 - i) * query_stride``, which is never negative.
        new_covered: ``[R]`` int32, F after this compression, in blocks.
        page_start: ``[R]`` int64, first output page of every request.
        num_candidate_pages: output pages in all.
        channels: part of the mask :data:`ATTENTION_CHANNELS`; the others are not computed.
        query_stride: tokens from one observed query to the next; 1 observes the last n.
        soft_cap: of the logits; 0: none.
        sink_logits: ``[L, H * G]`` fp32, -inf where there is none; None: nowhere. What a sink takes
            of a query is in no channel: no key can have it.

    Returns:
        ``[selected channels, num_candidate_pages, B]`` fp32, channels in ascending order. Zero
        where no request has a candidate.

    Raises:
        RuntimeError: ``channels`` has a bit of no such channel, ``query_stride`` is not positive,
            ``soft_cap`` negative or no number; sinks of another shape or dtype.
    """
    layers, _, window, _, head_size = ring.shape
    heads = num_pages.shape[2]
    state = State(num_pages, first_page, covered, page_scales, page_format)
    block_size = pages.shape[1]
    selected = _selected(channels, ATTENTION_CHANNELS)
    check_sinks(sink_logits, layers, ring.shape[3])
    if query_stride < 1:
        raise RuntimeError(f"query_stride must be at least 1, not {query_stride}")
    result = ring.new_zeros((len(selected), num_candidate_pages, block_size), dtype=torch.float32)
    flat = result.flatten(1)
    rows = zip(
        seq_lens.tolist(),
        state_slot.tolist(),
        observe_slot.tolist(),
        num_queries.tolist(),
        new_covered.tolist(),
        page_start.tolist(),
        strict=True,
    )
    for r, (seq_len, slot, observe, n, new_f, start) in enumerate(rows):
        unseen = torch.arange(n - 1, -1, -1, device=ring.device) * query_stride
        positions = (seq_len - 1 - unseen) // query_stride % window
        for layer in range(layers):
            queries = ring[layer, observe, positions].unflatten(1, (heads, -1)).float()
            for head in range(heads):
                of_head = state.head(block_table[r], slot, layer, head)
                keys = of_head.keys(pages, seq_len)
                logits = torch.einsum("qgd,kd->gqk", queries[:, head], keys[:, :head_size].float())
                key = torch.arange(keys.shape[0], device=ring.device)
                hidden = key >= keys.shape[0] - unseen[:, None]
                logits = capped(logits * scale, soft_cap).masked_fill_(hidden, float("-inf"))
                sinks = None if sink_logits is None else sink_logits[layer]
                p = with_sinks(logits, sinks, head).softmax(-1)[..., : len(key)]
                # A query older than every key that the head still has would leave NaN everywhere.
                p.masked_fill_(hidden, 0.0)
                place, count = of_head.candidates(start, new_f, block_size)
                for out, channel in zip(flat, selected, strict=True):
                    out[place : place + count] = _channel(channel, p, hidden)[:count]
    return result


def key_statistics(
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    page_scales: Tensor | None,
    page_format: int,
    new_covered: Tensor,
    page_start: Tensor,
    num_candidate_pages: int,
    channels: int,
) -> Tensor:
    """What each key is, whatever attends to it, over all layers and heads.

    With the keys k of one head (tail included), after RoPE, and their values v, per candidate key:

        NORM        |k_j|, the L2 norm (arXiv 2406.11430)
        LIKENESS    cos(k_j, mean over i of k_i / |k_i|), the cosine to the mean direction of the
                    head's keys (KeyDiff, arXiv 2504.15364)
        VALUE_NORM  |v_j|, the L2 norm of the value

    All in fp32, whatever the dtype of the cache. A key whose squares sum up to zero has no
    direction: it is left out of the mean, and its LIKENESS is 0; so is that of all keys if the
    directions themselves sum up to zero.

    Args:
        pages: ``[P, B, 2 * D]``; keys or values that no channel needs are not read.
        new_covered, page_start, num_candidate_pages: as for :func:`attention_statistics`.
        channels: part of the mask :data:`KEY_CHANNELS`; the others are not computed.

    Returns:
        ``[selected channels, num_candidate_pages, B]`` fp32, laid out as that op's.

    Raises:
        RuntimeError: ``channels`` has a bit of no such channel.
    """
    layers, heads = num_pages.shape[1:]
    block_size, head_size = pages.shape[1], pages.shape[2] // 2
    state = State(num_pages, first_page, covered, page_scales, page_format)
    selected = _selected(channels, KEY_CHANNELS)
    result = pages.new_zeros((len(selected), num_candidate_pages, block_size), dtype=torch.float32)
    flat = result.flatten(1)
    rows = zip(
        seq_lens.tolist(),
        state_slot.tolist(),
        new_covered.tolist(),
        page_start.tolist(),
        strict=True,
    )
    for r, (seq_len, slot, new_f, start) in enumerate(rows):
        for layer, head in product(range(layers), range(heads)):
            of_head = state.head(block_table[r], slot, layer, head)
            keys, values = of_head.keys(pages, seq_len).float().split(head_size, -1)
            norms, directions = _directions(keys)
            _, mean = _directions(directions.sum(0))  # of a mean, the count is no matter
            channel = {
                NORM: norms[:, 0],
                LIKENESS: (directions * mean).sum(-1),
                VALUE_NORM: _directions(values)[0][:, 0],
            }
            place, count = of_head.candidates(start, new_f, block_size)
            for out, of_channel in zip(flat, selected, strict=True):
                out[place : place + count] = channel[of_channel][:count]
    return result


def empty_statistics(pages: Tensor, num_candidate_pages: int, channels: int) -> Tensor:
    """What both ops return, by shape."""
    shape = (channels.bit_count(), num_candidate_pages, pages.shape[1])
    return pages.new_empty(shape, dtype=torch.float32)


def _selected(channels: int, known: int) -> list[int]:
    """The channels of a mask, ascending."""
    if channels & ~known:
        raise RuntimeError(f"channels is {channels}, not a mask of the bits {known}")
    return [channel for channel in range(len(CHANNELS)) if channels >> channel & 1]


def _directions(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Norms ``[..., 1]`` and vectors of norm 1; zeros stay zeros."""
    norms = vectors.square().sum(-1, keepdim=True).sqrt()
    return norms, torch.where(norms > 0, vectors / norms, 0)


def _channel(channel: int, p: Tensor, hidden: Tensor) -> Tensor:
    """``[n]`` fp32: one of :data:`CHANNELS` of probabilities ``[G, Q, n]``."""
    if channel == SUM:
        return p.sum((0, 1))
    if channel == SUM_SQUARES:
        return p.square().sum((0, 1))
    if channel == HEAD_SUM_SQUARES:
        return p.sum(1).square().sum(0)
    if channel == LOW_COUNT:
        visible = (~hidden).sum(-1, keepdim=True, dtype=torch.float32)
        return ((p.mean(0) < 1.0 / visible) & ~hidden).sum(0).float()
    if channel == MEAN_SQUARES:
        return p.mean(0).square().sum(0)
    if channel == ENTROPY:
        return p.xlogy(p).sum((0, 1)).neg()
    if channel == LAST:
        return p[:, -1:].sum((0, 1))
    return p.amax((0, 1)) if p.shape[1] else p.new_zeros(p.shape[2])
