# SPDX-License-Identifier: Apache-2.0
"""What a repetition of the prompt would pay to its keys."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.ops.reference.rows import State, capped, check_sinks, hidden_keys, with_sinks


def echo_scores(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    state_slot: Tensor,
    num_pages: Tensor,
    first_page: Tensor,
    covered: Tensor,
    page_scales: Tensor | None,
    page_format: int,
    segments: Tensor,
    rotation: Tensor,
    layer: int,
    max_segment: int,
    num_sinks: int,
    interleaved: bool,
    scale: float,
    scores: Tensor,
    *,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
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
    segment if that is shorter. A soft cap c makes each ``x`` above ``c * tanh(x / c)``; a learnt
    sink of the query head h adds ``exp(s_h)`` to ``Z_i``, once, for the repetition is one softmax.
    ``q2`` is rounded to the dtype of ``query``, as a model's own rotation would; all else is fp32.

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
        scores: ``[P, T]`` fp32, changed where a segment has a key: by page and key of the page, of
            which those of a tail have B.
        soft_cap: c; 0: none.
        sink_logits: ``[H * G]`` fp32, s; None: no head has one. ``num_sinks`` counts keys.

    Raises:
        RuntimeError: ``soft_cap`` is negative or no number; sinks of another shape or dtype.
    """
    check_sinks(sink_logits, query.shape[1])
    state = State(num_pages, first_page, covered, page_scales, page_format)
    heads = num_pages.shape[2]
    group, head_size, block_size = query.shape[1] // heads, query.shape[2], pages.shape[1]
    for row, begin, end, token in segments.tolist():
        slot, n = int(state_slot[row]), end - begin
        for head in range(heads):
            of_head = state.head(block_table[row], slot, layer, head)
            keys = of_head.keys(pages, int(seq_lens[row]))[:, :head_size].float()
            # The head holds what compression kept of the covered blocks, then every token.
            first = of_head.num_keys(begin, block_size)
            held = torch.arange(first, first + n, device=query.device)
            sinks, key = keys[: min(num_sinks, int(held[-1]) + 1)], keys[held]
            q1 = query[token : token + n, head * group : (head + 1) * group].float()
            q2 = rotated(q1, rotation, interleaved).to(query.dtype).float()
            echo = torch.einsum("qgd,kd->gqk", q2, key) * scale
            echo = capped(echo, soft_cap)
            sink = torch.einsum("qgd,kd->gqk", q2, sinks) * scale
            sink = capped(sink, soft_cap)
            past = torch.einsum("qgd,kd->gqk", q1, key) * scale
            past = capped(past, soft_cap)
            past.masked_fill_(hidden_keys(n, n, query.device), float("-inf"))
            seen = with_sinks(torch.cat([sink, echo, past], dim=-1), sink_logits, head)
            total = seen.logsumexp(-1, keepdim=True)
            scores[of_head.place(held, block_size)] = (echo - total).exp().amax((0, 1))


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
