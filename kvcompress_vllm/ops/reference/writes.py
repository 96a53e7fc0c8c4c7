# SPDX-License-Identifier: Apache-2.0
"""What is written as tokens come: keys and values, observed queries."""

from __future__ import annotations

from torch import Tensor


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
