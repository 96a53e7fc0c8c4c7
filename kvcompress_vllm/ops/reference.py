# SPDX-License-Identifier: Apache-2.0
"""What every op means, in plain PyTorch. Letters as in ``cache/layout.py``.

These functions are the specification that the native kernels are tested against, and what runs
where no kernel was built. They loop over (request, layer, head), never over tokens.

Several ops describe the same rows, always by the same six tensors:

    block_table [R, M] int32   block ids, logical length (see layout.py)
    seq_lens    [R]    int32   tokens of the request whose K/V is in the cache
    state_slot  [R]    int32   row of the three state tables, -1: not packed
    num_pages   [U, L, H] int32, first_page [U, L, H] int32, covered [U] int32 (F)
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout
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


def write_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the K/V of new tokens into one layer of the cache, in standard placement.

    Args:
        key, value: ``[>= T, H, D]``, any strides with a dense last dimension.
        kv_cache: ``[N, H, B, 2 * D]`` view of one layer, changed.
        slot_mapping: ``[T]`` int64, ``block_id * B + offset``; -1 skips the token.
    """
    num_tokens, block_size, head_size = slot_mapping.shape[0], kv_cache.shape[2], key.shape[-1]
    live = slot_mapping >= 0
    slot = slot_mapping[live]
    block, offset = slot.div(block_size, rounding_mode="floor"), slot.remainder(block_size)
    kv_cache[block, :, offset, :head_size] = key[:num_tokens][live]
    kv_cache[block, :, offset, head_size:] = value[:num_tokens][live]


def observe_queries(query: Tensor, ring_index: Tensor, ring: Tensor) -> None:
    """Copy the queries that compression will look at into the observation ring of one layer.

    Args:
        query: ``[>= T, H * G, D]`` after RoPE.
        ring_index: ``[T]`` int32, ``observe_slot * W + position % W``; -1 skips the token. Two
            tokens never share an index.
        ring: ``[O * W, H * G, D]``, the layer's part of the ring, changed.
    """
    live = ring_index >= 0
    ring[ring_index[live].long()] = query[: ring_index.shape[0]][live]


def paged_attention(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    query_start: Tensor,
    layer: int,
    scale: float,
    out: Tensor,
) -> None:
    """Causal attention of new tokens over their request's pages, prefill and decode alike.

    The keys of a head are its packed pages in order, then the tail; the last keys are the new
    tokens themselves, so query i of n sees all but the last ``n - 1 - i`` keys. Softmax in fp32.

    Args:
        query: ``[>= T, H * G, D]``; query heads of one KV head are adjacent.
        pages: ``[P, B, 2 * D]``.
        query_start: ``[R + 1]`` int32, first token of every request.
        layer: which layer of the state tables.
        scale: factor on the logits.
        out: like ``query``; rows of tokens outside ``[0, T)`` are left alone.
    """
    heads = num_pages.shape[2]
    head_size = query.shape[-1]
    group = query.shape[1] // heads
    starts = query_start.tolist()
    for r, (seq_len, slot) in enumerate(zip(seq_lens.tolist(), state_slot.tolist(), strict=True)):
        begin, end = starts[r], starts[r + 1]
        if begin == end:
            continue
        for head in range(heads):
            keys = _keys(
                pages, block_table[r], seq_len, slot, num_pages, first_page, covered, layer, head
            )
            n = keys.shape[0]
            q = query[begin:end, head * group : (head + 1) * group].float()
            logits = torch.einsum("qgd,kd->gqk", q, keys[:, :head_size].float()) * scale
            logits.masked_fill_(_hidden(end - begin, n, query.device), float("-inf"))
            result = torch.einsum("gqk,kd->qgd", logits.softmax(-1), keys[:, head_size:].float())
            out[begin:end, head * group : (head + 1) * group] = result.to(out.dtype)


def attention_statistics(
    ring: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    observe_slot: Tensor,
    num_queries: Tensor,
    new_covered: Tensor,
    page_start: Tensor,
    num_candidate_pages: int,
    channels: int,
    query_stride: int,
    scale: float,
) -> Tensor:
    """What observed queries of each request paid to each key, over all layers and heads.

    With ``p[q, g, k]`` the causal softmax of observed query q of group member g over all keys of
    the head (tail included), per candidate key:

        SUM               sum over q, g of p
        SUM_SQUARES       sum over q, g of p^2
        HEAD_SUM_SQUARES  sum over g of (sum over q of p)^2
        LOW_COUNT         how many q have mean over g of p < 1 / (keys that q sees)
        MEAN_SQUARES      sum over q of (mean over g of p)^2
        ENTROPY           sum over q, g of -p log p, in nats
        LAST              sum over g of p, for the last query alone
        MAXIMUM           the highest p of any q and g

    Candidates are the whole pages up to ``new_covered``: packed pages, then full tail pages. Those
    of (r, l, h) start at output page ``page_start[r] + first_page + (l * H + h) * (new_covered -
    covered)``.

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

    Returns:
        ``[selected channels, num_candidate_pages, B]`` fp32, channels in ascending order. Zero
        where no request has a candidate.

    Raises:
        RuntimeError: ``channels`` has a bit of no such channel, or ``query_stride`` is not
            positive.
    """
    layers, _, window, _, head_size = ring.shape
    heads = num_pages.shape[2]
    block_size = pages.shape[1]
    selected = _selected(channels, ATTENTION_CHANNELS)
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
                keys = _keys(
                    pages,
                    block_table[r],
                    seq_len,
                    slot,
                    num_pages,
                    first_page,
                    covered,
                    layer,
                    head,
                )
                logits = torch.einsum("qgd,kd->gqk", queries[:, head], keys[:, :head_size].float())
                key = torch.arange(keys.shape[0], device=ring.device)
                hidden = key >= keys.shape[0] - unseen[:, None]
                p = (logits * scale).masked_fill_(hidden, float("-inf")).softmax(-1)
                # A query older than every key that the head still has would leave NaN everywhere.
                p.masked_fill_(hidden, 0.0)
                place, count = _candidates(
                    start, slot, num_pages, first_page, covered, new_f, layer, head, block_size
                )
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
            keys, values = (
                _keys(
                    pages, block_table[r], seq_len, slot, num_pages, first_page, covered, layer,
                    head,
                )
                .float()
                .split(head_size, -1)
            )  # fmt: skip
            norms, directions = _directions(keys)
            _, mean = _directions(directions.sum(0))  # of a mean, the count is no matter
            channel = {
                NORM: norms[:, 0],
                LIKENESS: (directions * mean).sum(-1),
                VALUE_NORM: _directions(values)[0][:, 0],
            }
            place, count = _candidates(
                start, slot, num_pages, first_page, covered, new_f, layer, head, block_size
            )
            for out, of_channel in zip(flat, selected, strict=True):
                out[place : place + count] = channel[of_channel][:count]
    return result


def echo_scores(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    segments: Tensor,
    rotation: Tensor,
    layer: int,
    max_segment: int,
    num_sinks: int,
    interleaved: bool,
    scale: float,
    scores: Tensor,
) -> None:
    """What a repetition of the prompt would pay to each of its keys, for one layer.

    A token that is repeated has the query of its first reading, rotated by the distance between
    the two (RoPE composes). KVzip (Kim et al., 2025) runs the repetition; here it is computed from
    the queries of prefill, segment by segment. For query i of segment [a, b), ``q1`` as it is and
    ``q2`` rotated, S the head's first ``num_sinks`` keys:

        Z_i = sum of exp(q2.k * scale) over S
            + sum of exp(q2.k * scale) over the keys of [a, b)
            + sum of exp(q1.k * scale) over the keys of [a, i]
        scores_j = max over i in [a, b) and the KV head's query heads of exp(q2.k_j * scale) / Z_i

    S counts where it is inside the segment, too, for the repetition sees it twice; it ends with the
    segment if that is shorter. ``q2`` is rounded to the dtype of ``query``, as a model's own
    rotation would; all else is fp32.

    Args:
        query: ``[>= T, H * G, D]`` after RoPE; query heads of one KV head are adjacent.
        pages: ``[P, B, 2 * D]``, which hold the keys of all segments already.
        segments: ``[S, 4]`` int32, for each the row of ``block_table``, a, b (positions in the
            request, in blocks that no compression covered) and the token of ``query`` that is
            position a. No key is in two segments.
        rotation: ``[n, 2]`` fp32: cosine and sine of the angle between the two readings, for the n
            pairs that the first 2n dimensions of a head form; n = 0: no rotation.
        layer: which layer of the state tables.
        max_segment: no segment is longer.
        interleaved: pairs are dimensions (2i, 2i + 1), as in GPT-J, else (i, i + n), as in NeoX.
        scale: factor on the logits.
        scores: ``[P, B]`` fp32, changed where a segment has a key: laid out as ``pages``.
    """
    layers, heads = num_pages.shape[1:]
    group, head_size, block_size = query.shape[1] // heads, query.shape[2], pages.shape[1]
    for row, begin, end, token in segments.tolist():
        slot, n = int(state_slot[row]), end - begin
        for head in range(heads):
            packed, old_f = _packed(slot, num_pages, covered, layer, head)
            first = 0 if slot < 0 else int(first_page[slot, layer, head])
            keys = _keys(
                pages, block_table[row], int(seq_lens[row]), slot, num_pages, first_page, covered,
                layer, head,
            )[:, :head_size].float()  # fmt: skip
            # The head holds what compression kept of the covered blocks, then every token.
            held = torch.arange(begin, end, device=query.device) + (packed - old_f) * block_size
            sinks, key = keys[: min(num_sinks, int(held[-1]) + 1)], keys[held]
            q1 = query[token : token + n, head * group : (head + 1) * group].float()
            q2 = rotated(q1, rotation, interleaved).to(query.dtype).float()
            echo = torch.einsum("qgd,kd->gqk", q2, key) * scale
            sink = torch.einsum("qgd,kd->gqk", q2, sinks) * scale
            past = torch.einsum("qgd,kd->gqk", q1, key) * scale
            past.masked_fill_(_hidden(n, n, query.device), float("-inf"))
            total = torch.cat([sink, echo, past], dim=-1).logsumexp(-1, keepdim=True)
            page = layout.page_id(
                block_table[row], old_f, packed, first, layer * heads + head, layers * heads,
                held.div(block_size, rounding_mode="floor"),
            )  # fmt: skip
            scores[page, held.remainder(block_size)] = (echo - total).exp().amax((0, 1))


def select_pages(
    scores: Tensor,
    page_start: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    new_covered: Tensor,
    num_freed: Tensor,
    num_recent: Tensor,
    num_sinks: int,
    floor_pages: int,
    num_kept_pages: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the keys to keep, whole pages at a time (KV-Compress, arXiv 2410.00161, sec. 4.2.2).

    The candidate keys of a head are sorted ascending by (shielded, score, key). Freeing e pages of
    the head costs the score at rank ``e * B - 1``. In every group of heads the cheapest pages are
    freed, ties by (cost, layer, head, page), until ``num_freed`` are gone. Costs never fall within
    a head, so a head loses its e lowest pages' worth of keys. A NaN score counts as +inf.

    Args:
        scores: ``[pages, B]`` fp32, higher means keep; laid out as the statistics op's output.
        num_freed: ``[R, A]`` int32, pages to free per group of heads; A divides L * H and group
            ``a`` is the a-th run of ``L * H / A`` heads in (layer, head) order: A = 1 all heads
            compete, A = L the heads of a layer, A = L * H none.
        num_recent: ``[R]`` int32, candidate keys at the end of every head that are shielded.
        num_sinks: candidate keys at the start of every head that are shielded.
        floor_pages: pages that every head keeps; covers the shields:
            ``floor_pages * B >= num_sinks + num_recent``.
        num_kept_pages: pages kept over all requests.

    Returns:
        ``kept_pages`` ``[R, L, H]`` int32, ``kept_first`` ``[R, L, H]`` int32 (exclusive prefix sum
        over all R, L, H), ``kept_keys`` ``[num_kept_pages, B]`` int32: for the kept pages in
        (r, l, h) order, which key of the head fills each place; ascending within a head.

    Raises:
        RuntimeError: ``num_freed`` cannot be met, or does not leave ``num_kept_pages``.
    """
    layers, heads = num_pages.shape[1:]
    slots, block_size = layers * heads, scores.shape[1]
    num_requests, groups = num_freed.shape
    kept_pages = torch.zeros(num_requests, layers, heads, dtype=torch.int32, device=scores.device)
    kept_keys: list[Tensor] = []
    flat = torch.nan_to_num(
        scores.flatten(), nan=float("inf"), posinf=float("inf"), neginf=float("-inf")
    )
    rows = zip(
        page_start.tolist(),
        state_slot.tolist(),
        new_covered.tolist(),
        num_recent.tolist(),
        num_freed.tolist(),
        strict=True,
    )
    for r, (start, slot, new_f, recent, freed) in enumerate(rows):
        orders: list[Tensor] = []
        costs: list[list[tuple[float, int, int]]] = [[] for _ in range(groups)]
        counts: list[int] = []
        for index in range(slots):
            layer, head = divmod(index, heads)
            packed, old_f = _packed(slot, num_pages, covered, layer, head)
            first = 0 if slot < 0 else int(first_page[slot, layer, head])
            begin = (start + first + index * (new_f - old_f)) * block_size
            n = (packed + new_f - old_f) * block_size
            score = flat[begin : begin + n]
            key = torch.arange(n, device=scores.device)
            shielded = (key < num_sinks) | (key >= n - recent)
            order = score.argsort(stable=True)
            order = order[shielded[order].to(torch.int8).argsort(stable=True)]
            orders.append(order)
            counts.append(n // block_size)
            evictable = max(0, n // block_size - floor_pages)
            price = score[order][block_size - 1 : evictable * block_size : block_size]
            costs[index * groups // slots] += [(c, index, e) for e, c in enumerate(price.tolist())]
        lost = [0] * slots
        for group, wanted in zip(costs, freed, strict=True):
            if not 0 <= wanted <= len(group):
                raise RuntimeError(
                    f"select_pages: request {r} is to free {wanted} pages of a group "
                    f"of heads that can free {len(group)}"
                )
            for _, index, _ in sorted(group)[:wanted]:
                lost[index] += 1
        for index, order in enumerate(orders):
            kept_pages[r].view(-1)[index] = counts[index] - lost[index]
            kept_keys.append(order[lost[index] * block_size :].sort().values)
    keys = torch.cat(kept_keys) if kept_keys else scores.new_empty(0, dtype=torch.int64)
    if keys.numel() != num_kept_pages * block_size:
        raise RuntimeError(
            f"select_pages: {keys.numel()} keys kept, expected {num_kept_pages} "
            f"pages of {block_size}"
        )
    flat_kept = kept_pages.flatten()
    kept_first = (flat_kept.cumsum(0) - flat_kept).to(torch.int32).view_as(kept_pages)
    return kept_pages, kept_first, keys.to(torch.int32).view(num_kept_pages, block_size)


def compact_pages(
    pages: Tensor,
    block_table: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    kept_pages: Tensor,
    kept_first: Tensor,
    kept_keys: Tensor,
    new_blocks: Tensor,
) -> None:
    """Copy the kept K/V of each request into its new packed blocks, out of place.

    Page i of request r's packed blocks is page ``i % (L * H)`` of block ``i // (L * H)``; head
    (l, h) gets ``kept_pages`` of them from its exclusive prefix sum within the request on.

    Args:
        pages: ``[P, B, 2 * D]``, changed; new blocks never overlap the old ones of any request. Or
            what else is stored by key, ``[P, B, n]`` of 4 bytes or a multiple of 16 for each.
        block_table, state_slot, ...: the rows and state before this compression.
        kept_pages, kept_first, kept_keys: from :func:`select_pages`.
        new_blocks: ``[R, >= C]`` int32 block ids.
    """
    layers, heads = num_pages.shape[1:]
    slots, block_size = layers * heads, pages.shape[1]
    offset = torch.arange(block_size, device=pages.device)
    for r, slot in enumerate(state_slot.tolist()):
        base = int(kept_first[r, 0, 0])
        for index in range(slots):
            layer, head = divmod(index, heads)
            count, first = int(kept_pages[r, layer, head]), int(kept_first[r, layer, head])
            key = kept_keys[first : first + count].flatten().long()
            packed, old_f = _packed(slot, num_pages, covered, layer, head)
            old_first = 0 if slot < 0 else int(first_page[slot, layer, head])
            source = layout.page_id(
                block_table[r],
                old_f,
                packed,
                old_first,
                index,
                slots,
                key.div(block_size, rounding_mode="floor"),
            )
            j = torch.arange(count, device=pages.device)
            target = layout.page_id(new_blocks[r], 0, count, first - base, index, slots, j)
            pages[target.repeat_interleave(block_size), offset.repeat(count)] = pages[
                source, key.remainder(block_size)
            ]


def _packed(
    slot: int, num_pages: Tensor, covered: Tensor, layer: int, head: int
) -> tuple[int, int]:
    """Packed pages of a head, and F."""
    return (0, 0) if slot < 0 else (int(num_pages[slot, layer, head]), int(covered[slot]))


def _selected(channels: int, known: int) -> list[int]:
    """The channels of a mask, ascending."""
    if channels & ~known:
        raise RuntimeError(f"channels is {channels}, not a mask of the bits {known}")
    return [channel for channel in range(len(CHANNELS)) if channels >> channel & 1]


def _candidates(
    start: int,
    slot: int,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    new_covered: int,
    layer: int,
    head: int,
    block_size: int,
) -> tuple[int, int]:
    """Where the output for a head's candidate keys begins, and how many they are."""
    packed, old_f = _packed(slot, num_pages, covered, layer, head)
    first = 0 if slot < 0 else int(first_page[slot, layer, head])
    fresh = new_covered - old_f
    page = start + layout.first_candidate(first, layer * num_pages.shape[2] + head, fresh)
    return page * block_size, (packed + fresh) * block_size


def _keys(
    pages: Tensor,
    row: Tensor,
    seq_len: int,
    slot: int,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    layer: int,
    head: int,
) -> Tensor:
    """``[n, 2 * D]``: K and V of everything the head holds, packed pages first."""
    layers, heads = num_pages.shape[1:]
    packed, old_f = _packed(slot, num_pages, covered, layer, head)
    first = 0 if slot < 0 else int(first_page[slot, layer, head])
    n = layout.num_keys(seq_len, old_f, packed, pages.shape[1])
    j = torch.arange(-(-n // pages.shape[1]), device=pages.device)
    ids = layout.page_id(row, old_f, packed, first, layer * heads + head, layers * heads, j)
    return pages[ids].flatten(0, 1)[:n]


def rotated(vectors: Tensor, rotation: Tensor, interleaved: bool) -> Tensor:
    """``[..., D]``: each pair of dimensions turned by its angle; see :func:`echo_scores`."""
    pairs = rotation.shape[0]
    turned = vectors.clone()
    if interleaved:
        x, y = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        x, y = slice(0, pairs), slice(pairs, 2 * pairs)
    cos, sin = rotation.unbind(-1)
    turned[..., x] = vectors[..., x] * cos - vectors[..., y] * sin
    turned[..., y] = vectors[..., y] * cos + vectors[..., x] * sin
    return turned


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


def _hidden(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """``[num_queries, num_keys]`` bool: True where causality hides the key; ends aligned."""
    full = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return full.triu(num_keys - num_queries + 1)
