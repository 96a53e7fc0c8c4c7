# SPDX-License-Identifier: Apache-2.0
"""Attention over packed pages and tail."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.ops.reference.rows import State, capped, check_sinks, hidden_keys, with_sinks


def paged_attention(
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
    query_start: Tensor,
    layer: int,
    scale: float,
    out: Tensor,
    *,
    soft_cap: float = 0.0,
    sink_logits: Tensor | None = None,
    decode_query_len: int = 1,
) -> None:
    """Causal attention of new tokens over their request's pages, prefill and decode alike.

    The keys of a head are its packed pages in order, then the tail; the last keys are the new
    tokens themselves, so query i of n sees all but the last ``n - 1 - i`` keys. In fp32, with the
    keys k and values v that query q of query head h sees::

        x_j = q.k_j * scale                       without a soft cap
        x_j = c * tanh(q.k_j * scale / c)         with the soft cap c
        out = sum of exp(x_j) * v_j / (exp(s_h) + sum of exp(x_j))

    ``exp(s_h)`` is there with sinks only: it takes its share and gives nothing. A sink is no key:
    no cap applies to it, and causality does not hide it.

    Args:
        query: ``[>= T, H * G, D]``; query heads of one KV head are adjacent.
        pages: ``[P, B, 2 * D]``.
        query_start: ``[R + 1]`` int32, first token of every request.
        layer: which layer of the state tables.
        scale: factor on the logits.
        out: like ``query``; rows of tokens outside ``[0, T)`` are left alone.
        soft_cap: c (Gemma 2); 0: none.
        sink_logits: ``[H * G]`` fp32, s (gpt-oss), -inf for a head without; None: no head has one.
        decode_query_len: new tokens that a generation has in a step, its next and what is drafted.
            Rows of so many are to read each of their keys once; changes nothing of the result.

    Raises:
        RuntimeError: ``soft_cap`` is negative or no number; sinks of another shape or dtype;
            ``decode_query_len`` is not positive.
    """
    if decode_query_len < 1:
        raise RuntimeError(f"decode_query_len must be 1 or more, not {decode_query_len}")
    check_sinks(sink_logits, query.shape[1])
    state = State(num_pages, first_page, covered, page_scales, page_format)
    heads = num_pages.shape[2]
    head_size = query.shape[-1]
    group = query.shape[1] // heads
    starts = query_start.tolist()
    for r, (seq_len, slot) in enumerate(zip(seq_lens.tolist(), state_slot.tolist(), strict=True)):
        begin, end = starts[r], starts[r + 1]
        if begin == end:
            continue
        for head in range(heads):
            keys = state.head(block_table[r], slot, layer, head).keys(pages, seq_len)
            n = keys.shape[0]
            q = query[begin:end, head * group : (head + 1) * group].float()
            logits = torch.einsum("qgd,kd->gqk", q, keys[:, :head_size].float()) * scale
            logits = capped(logits, soft_cap)
            logits.masked_fill_(hidden_keys(end - begin, n, query.device), float("-inf"))
            p = with_sinks(logits, sink_logits, head).softmax(-1)[..., :n]
            result = torch.einsum("gqk,kd->qgd", p, keys[:, head_size:].float())
            out[begin:end, head * group : (head + 1) * group] = result.to(out.dtype)
