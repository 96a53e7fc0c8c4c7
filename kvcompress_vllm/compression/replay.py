# SPDX-License-Identifier: Apache-2.0
"""What the repetition of a context pays to its keys. Letters as in ``cache/layout.py``.

Library matrix products, not an op of ours: it is done once per context, and they are as fast as
such products get.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.records.group import CacheGroup

MOST_LOGITS = 1 << 25
"""Numbers that are held at a time, fp32: 128 MiB, and twice as much in intermediates."""


def scratch_bytes(num_tokens: int, group: CacheGroup) -> int:
    """Memory that :func:`score` takes while it runs, of a row of ``num_tokens`` tokens."""
    keys = num_tokens * group.heads * group.head_size  # as gathered, in one piece, and in fp32
    return 4 * (3 * MOST_LOGITS + 3 * keys)


def clear(state: PackedState, blocks: Sequence[int]) -> None:
    """Forget the echo scores of uncompressed blocks.

    Raises:
        RuntimeError: none are stored.
    """
    stored = _stored(state)
    index = to_device(blocks, torch.int64, stored.device)
    stored.view(-1, state.group.pages_per_block, state.group.page_keys).index_fill_(0, index, 0)


def score(
    state: PackedState,
    pages: Tensor,
    layer: int,
    query: Tensor,
    row: Tensor,
    num_context: int,
    first: int,
) -> None:
    """Raise the echo scores of a context's keys to the highest probability that one of some tokens
    behind it pays to them, in one layer.

    Of key j it is the maximum over tokens and the KV head's query heads of
    ``exp(z_j) / (sum over all keys up to the token of exp(z) + exp(sink))``, where ``z`` is
    ``q.k * scale`` within the group's soft cap, and a learnt sink only counts where the query head
    has one.

    Args:
        pages: ``[P, B, 2 * D]``, which hold the keys of all these tokens already.
        query: ``[T, H * G, D]`` of tokens at positions ``first`` on, after RoPE.
        row: ``[M]`` int64 uncompressed blocks, as far as the last of them reaches.
        num_context: blocks of the context.
        first: position of the first token; none is in the context.

    Raises:
        RuntimeError: no echo scores are stored.
    """
    group, stored = state.group, _stored(state)
    heads, size, count = group.heads, group.block_size, query.shape[0]
    page = row[:, None] * group.pages_per_block + layer * heads
    page = page + torch.arange(heads, device=row.device)
    keys = pages[page][..., : group.head_size].permute(1, 0, 2, 3).flatten(1, 2)
    keys = keys[:, : first + count]
    q = query.view(count, heads, -1, group.head_size).permute(1, 2, 0, 3)
    position = torch.arange(first + count, device=row.device)
    n = num_context * size
    sinks = state.logits(layer)["sink_logits"]
    best = torch.zeros(heads, n, dtype=torch.float32, device=row.device)
    step = max(1, MOST_LOGITS // (heads * q.shape[1] * (first + count)))
    for begin in range(0, count, step):
        part = q[:, :, begin : begin + step]
        logits = _product(part.flatten(1, 2), keys).mul_(group.scale)
        if group.soft_cap:
            logits.div_(group.soft_cap).tanh_().mul_(group.soft_cap)
        logits = logits.view(*part.shape[:3], -1)
        later = position > position[first + begin : first + begin + part.shape[2], None]
        logits.masked_fill_(later, float("-inf"))
        total = logits.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.view(heads, -1, 1, 1))
        found = logits[..., :n].sub_(total).exp_().amax((1, 2))
        best = torch.maximum(best, found)
    of_context = page[:num_context].flatten()
    cells = best.view(heads, num_context, size).transpose(0, 1).flatten(0, 1)
    stored[of_context, :size] = torch.maximum(stored[of_context, :size], cells)


def _product(queries: Tensor, keys: Tensor) -> Tensor:
    """``[H, Q, K]`` fp32 of ``[H, Q, D]`` and ``[H, K, D]``."""
    if queries.is_cuda and queries.dtype != torch.float32:
        return torch.bmm(queries, keys.mT, out_dtype=torch.float32)
    return queries.float() @ keys.float().mT


def _stored(state: PackedState) -> Tensor:
    if state.echo is None:
        raise RuntimeError("kv_compress: no echo scores are stored for a repetition")
    return state.echo
