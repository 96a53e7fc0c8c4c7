# SPDX-License-Identifier: Apache-2.0
"""Attention on the CPU platform beside compression: layers with a window or with chunks, and all
layers where compression is off. vLLM's wheel has no kernel of its own for them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.v1.attention.backend import AttentionLayer

from kvcompress_vllm.integration.compat.releases import kv_cache_layouts
from kvcompress_vllm.integration.worker.attention import (
    KVCompressBackend,
    KVCompressImpl,
    KVCompressMetadata,
)


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
                table = meta.block_table[row]
                out[span] = attend(query[span], kv_cache, table, length, self.window, self.scale)
        return output


def attend(
    query: Tensor, kv_cache: Tensor, row: Tensor, length: int, window: int | None, scale: float
) -> Tensor:
    """Causal attention of the last tokens of one request.

    Args:
        query: ``[n, H * G, D]`` of its tokens ``[length - n, length)``.
        kv_cache: ``[N, H, B, 2 * D]`` of one layer, of any strides.
        row: ``[M]`` block ids; those before the window may be anything.
        length: tokens in the cache.
        window: keys that a token sees, itself included; None: all.

    Returns:
        ``[n, H * G, D]``.
    """
    size, first = kv_cache.shape[2], length - query.shape[0]
    oldest = 0 if window is None else max(0, first - window + 1)
    begin = oldest // size
    pages = kv_cache[row[begin : -(-length // size)].long()].transpose(0, 1).flatten(1, 2)
    keys, values = pages[:, oldest - begin * size : length - begin * size].chunk(2, dim=-1)
    distance = torch.arange(first, length)[:, None] - torch.arange(oldest, length)
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    found = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=seen,
        scale=scale,
        enable_gqa=True,
    )
    return found[0].transpose(0, 1)


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
