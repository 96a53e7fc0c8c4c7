# SPDX-License-Identifier: Apache-2.0
"""Where layers lie in the KV cache: those that are compressed side by side in each block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor

from kvcompress_vllm.integration.compat.releases import vllm_places_layers
from kvcompress_vllm.integration.engine.groups import compressed_group
from kvcompress_vllm.integration.engine.kv_cache import cache_group
from kvcompress_vllm.records.group import CacheGroup


def packed_config(config: KVCacheConfig) -> KVCacheConfig:
    """Lay all compressed layers of a block out side by side in one buffer:
    ``[N, L, H, B, 2 * D]``.

    Layer i of every group lies where that of the compressed one does, as a block belongs to one
    group at a time; what other groups have more lies in buffers of its own, as vLLM has it.

    Raises:
        ValueError: there is not one uniform group to compress.
    """
    groups = config.kv_cache_groups
    group = groups[compressed_group([each.kv_cache_spec for each in groups])]
    shape = cache_group(group.kv_cache_spec, len(group.layer_names))
    most = max(len(each.layer_names) for each in groups)
    if not group.layer_names:
        raise ValueError(
            "kv_compress: no layer of this stage of the pipeline has full attention; use fewer "
            "stages"
        )
    layer_bytes = group.kv_cache_spec.page_size_bytes
    if vllm_places_layers():
        return replace(config, kv_cache_tensors=_regions(config, shape.layers, layer_bytes))
    tensors = []
    for index in range(most):
        shared = [each.layer_names[index] for each in groups if index < len(each.layer_names)]
        # A dictionary, as the types of 0.29 and later do not know `shared_by`.
        where: dict[str, Any] = {"shared_by": shared}
        size = layer_bytes
        if index < shape.layers:
            size = shape.block_bytes
            where |= {"offset": index * layer_bytes, "block_stride": size}
        tensors.append(KVCacheTensor(size=size * config.num_blocks, **where))
    return replace(config, kv_cache_tensors=tensors)


def _regions(config: KVCacheConfig, layers: int, layer_bytes: int) -> list[KVCacheTensor]:
    """The same from 0.29 on, where one allocation has all layers, and a tensor says where those of
    a group begin and how far apart they are: vLLM's blocks would have room for the largest group,
    and a gap behind ours."""
    blocks = config.num_blocks
    size = max(tensor.size for tensor in config.kv_cache_tensors)
    tensors = []
    for each in config.kv_cache_groups:
        first, beyond = each.layer_names[:layers], each.layer_names[layers:]
        places: list[tuple[list[str], int, int, int]] = [
            (first, layer_bytes, layers * layer_bytes, 0),
            (beyond, blocks * layer_bytes, layer_bytes, blocks * layers * layer_bytes),
        ]
        for names, layer_stride, block_stride, offset in places:
            if names:
                where: dict[str, Any] = {
                    "layers": names, "layer_stride": layer_stride, "block_stride": block_stride,
                }  # fmt: skip
                tensors.append(KVCacheTensor(size=size, offset=offset, **where))
    return tensors


def all_pages(first_layer: torch.Tensor, group: CacheGroup) -> torch.Tensor:
    """``[P, B, 2 * D]`` over the buffer that ``first_layer`` ``[N, H, B, 2 * D]`` is a view of.

    Raises:
        RuntimeError: vLLM did not lay the layers out side by side.
    """
    blocks, (keys, width) = first_layer.shape[0], group.page_shape
    page = keys * width
    shape, strides = (
        (blocks, group.heads, keys, width),
        (group.pages_per_block * page, page, width, 1),
    )
    found = tuple(first_layer.shape), first_layer.stride(), first_layer.storage_offset()
    if found != (shape, strides, 0):
        raise RuntimeError(
            f"kv_compress: a layer of the KV cache has shape, strides and offset {found}, expected "
            f"{(shape, strides, 0)}"
        )
    return first_layer.as_strided((group.num_pages(blocks), keys, width), (page, width, 1), 0)
