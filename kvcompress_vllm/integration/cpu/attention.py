# SPDX-License-Identifier: Apache-2.0
"""Attention on the CPU platform beside compression: layers with a window or with chunks, and all
layers where compression is off. vLLM's wheel has no kernel of its own for them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionLayer

from kvcompress_vllm.integration.compat.releases import kv_cache_layouts
from kvcompress_vllm.integration.worker.attention import KVCompressBackend, KVCompressImpl
from kvcompress_vllm.integration.worker.metadata import KVCompressMetadata


class LocalCpuImpl(KVCompressImpl):
    """One layer that compression leaves alone: it reads the blocks that its queries see."""

    windows: ClassVar[bool] = True

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KVCompressMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        # Between the pages of other layers a cache is no list of pages.
        if attn_metadata is None or (self.window is None and kv_cache.is_contiguous()):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output)
        meta = attn_metadata
        query = query.view(-1, self.num_heads, self.head_size)
        out = output.view(-1, self.num_heads, self.head_size)
        starts, lengths = meta.query_start.tolist(), meta.seq_lens.tolist()
        for row, length in enumerate(lengths):
            span = slice(starts[row], starts[row + 1])
            if span.start < span.stop:
                out[span] = attend(
                    query[span],
                    kv_cache,
                    meta.block_table[row],
                    length,
                    self.window,
                    self.scale,
                    self.soft_cap,
                    self.sinks,
                )
        return output


def attend(
    query: Tensor,
    kv_cache: Tensor,
    row: Tensor,
    length: int,
    window: int | None,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last tokens of one request.

    Args:
        query: ``[n, H * G, D]`` of its tokens ``[length - n, length)``.
        kv_cache: ``[N, H, B, 2 * D]`` of one layer, of any strides.
        row: ``[M]`` block ids; those before the window may be anything.
        length: tokens in the cache.
        window: keys that a token sees, itself included; None: all.
        soft_cap: logits are at most so large, ``cap * tanh(logit / cap)``; 0: as large as they are.
        sinks: ``[H * G]`` logits that belong to no key; None: none.

    Returns:
        ``[n, H * G, D]``.
    """
    (count, query_heads, _), (heads, size) = query.shape, kv_cache.shape[1:3]
    first = length - count
    oldest = 0 if window is None else max(0, first - window + 1)
    begin = oldest // size
    pages = kv_cache[row[begin : -(-length // size)].long()].transpose(0, 1).flatten(1, 2)
    keys, values = pages[:, oldest - begin * size : length - begin * size].float().chunk(2, dim=-1)
    distance = torch.arange(first, length)[:, None] - torch.arange(oldest, length)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    by_head = query.float().transpose(0, 1).unflatten(0, (heads, -1))
    logits = by_head @ keys[:, None].transpose(2, 3) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    logits = logits.masked_fill(~seen, -torch.inf).flatten(0, 1)
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(query_heads, count, 1)
        logits = torch.cat([logits, column], -1)
    shares = logits.softmax(-1)[..., : keys.shape[1]].unflatten(0, (heads, -1))
    found: Tensor = (shares @ values[:, None]).flatten(0, 1).transpose(0, 1).to(query.dtype)
    return found


class LocalCpuBackend(KVCompressBackend):
    """Layers with a window or chunks, in the blocks that those with full attention share."""

    @staticmethod
    def get_impl_cls() -> type[KVCompressImpl]:
        return LocalCpuImpl


class PlainCpuBackend(LocalCpuBackend):
    """Where compression is off: each layer's cache lies on its own. Over the packed layout ordinary
    paged attention would copy the cache in every layer."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return kv_cache_layouts("LBHNC")
