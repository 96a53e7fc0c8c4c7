# SPDX-License-Identifier: Apache-2.0
"""Where states (Mamba, linear attention) lie beside pages, in blocks of one pool (decision 033).

A block belongs to one cache group at a time. One of ours is its kernel blocks, each with the pages
of all layers and heads; in one of a group with states, layer i has the i-th of L equal parts::

    ours      | kernel block 0: layer 0, head 0 | ... | layer L-1, head H-1 | kernel block 1: ... |
    states    | layer 0: convolution, recurrence, gap | layer 1 | ... | layer L-1                 |

vLLM would lay out neither so, and says nothing where its views do not fit.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec

from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.integration.engine.groups import compressed_group
from kvcompress_vllm.integration.engine.kv_cache import cache_group
from kvcompress_vllm.records.group import CacheGroup


def lay_out(layers: dict[str, Any], config: KVCacheConfig) -> None:
    """View the cache of a model with states as drawn above: rebinds ``kv_cache`` of its layers.

    vLLM has allocated it, one buffer for the first L layers of every group, and views it as if a
    block were one page per head. Rows and slots mean the same bytes' worth of tokens either way:
    slot ``n * k * B + i`` is token i of block n.

    Args:
        layers: vLLM's, by name.
        config: as ``packed_config`` made it.

    Raises:
        RuntimeError: vLLM laid blocks out otherwise, or layers are neither ours nor have states.
    """
    groups = config.kv_cache_groups
    index = compressed_group([each.kv_cache_spec for each in groups])
    names, spec = groups[index].layer_names, groups[index].kv_cache_spec
    shape = cache_group(spec, len(names))
    found = layers[names[0]].kv_cache
    step = found.stride(0) * found.element_size()
    if (step, found.storage_offset(), len(found)) != (shape.block_bytes, 0, config.num_blocks):
        raise RuntimeError(
            f"kv_compress: {len(found)} blocks begin at number {found.storage_offset()} and are "
            f"{step} bytes apart, expected {config.num_blocks}, 0 and {shape.block_bytes}"
        )
    buffer = torch.empty(0, dtype=torch.int8, device=found.device).set_(found.untyped_storage())
    for place, name in enumerate(names):
        layers[name].kv_cache = _pages(buffer.view(found.dtype), shape, config.num_blocks, place)
    for each in groups[:index] + groups[index + 1 :]:
        if not isinstance(each.kv_cache_spec, MambaSpec):
            raise RuntimeError(
                f"kv_compress: {each.kv_cache_spec} cannot lie beside states and pages"
            )
        # What is beyond lies in buffers of its own, where vLLM is right that blocks are as far
        # apart as a state is large.
        inside = each.layer_names[: shape.layers]
        for place, name in enumerate(inside):
            layers[name].kv_cache = _states(
                each.kv_cache_spec,
                buffer,
                config.num_blocks,
                shape.block_bytes,
                place * spec.page_size_bytes,
            )


def _pages(numbers: Tensor, group: CacheGroup, num_blocks: int, layer: int) -> Tensor:
    """``[N * k, H, B, 2 * D]`` of a layer of ours."""
    keys, width = group.page_shape
    page = keys * width
    return numbers.as_strided(
        (num_blocks * group.kernel_blocks, group.heads, keys, width),
        (group.pages_per_block * page, page, width, 1),
        layer * group.heads * page,
    )


def _states(
    spec: MambaSpec, raw: Tensor, num_blocks: int, stride: int, offset: int
) -> list[Tensor]:
    """The states of a layer, one behind the other in its part of each block; bytes."""
    sizes = [
        prod(shape) * dtype.itemsize for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    ]
    result = []
    for shape, dtype, begin in zip(
        spec.shapes, spec.dtypes, accumulate(sizes, initial=offset), strict=False
    ):
        if begin % dtype.itemsize or stride % dtype.itemsize:
            raise RuntimeError(f"kv_compress: a state of {dtype} begins at byte {begin} of a block")
        strides = torch.empty(shape, device="meta").stride()
        result.append(
            raw.view(dtype).as_strided(
                (num_blocks, *shape),
                (stride // dtype.itemsize, *strides),
                begin // dtype.itemsize,
            )
        )
    return result


class BlockZeroer:
    """In the place of runner V1's, which takes the distance between blocks for the size of a part,
    and would zero what lies in the next block; on CPU it would take kernel blocks for blocks.

    Args:
        pages: ``[P, B, 2 * D]``, all of them.
    """

    def __init__(self, pages: Tensor, group: CacheGroup) -> None:
        self._blocks = pages.view(
            -1, group.kernel_blocks * group.pages_per_block * pages[0].numel()
        )

    def zero_block_ids(self, block_ids: list[int]) -> None:
        """Zero blocks that a step begins to use: a state may have left what is no number."""
        if block_ids:
            index = to_device(block_ids, torch.int64, self._blocks.device)
            self._blocks.index_fill_(0, index, 0)


def zero_blocks_of(runner: Any, pages: Tensor, group: CacheGroup) -> None:
    """Have runner V1 zero whole blocks of ours."""
    runner._zero_block_ids = BlockZeroer(pages, group).zero_block_ids
