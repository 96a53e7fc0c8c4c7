# SPDX-License-Identifier: Apache-2.0
"""What vLLM is told of the cache: specs of layers, and how much memory they want."""

from dataclasses import replace

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec, cache_group
from tests.integration.simulation import MODEL

STOCK = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
SPEC = KVCompressSpec.of(STOCK, window=8, queries_per_head=2, scale=0.25)


def test_layers_are_merged_into_what_holds_for_all() -> None:
    merged = KVCompressSpec.merge([SPEC, replace(SPEC, window=16), SPEC])
    assert merged == replace(SPEC, window=16)
    with pytest.raises(ValueError, match="share the attention scale"):
        KVCompressSpec.merge([SPEC, replace(SPEC, scale=0.5)])


def test_a_group_is_made_of_our_specs_alone() -> None:
    group = cache_group(SPEC, 3)
    assert (group.layers, group.heads, group.queries_per_head, group.head_size) == (3, 2, 2, 32)
    assert (group.block_size, group.itemsize, group.scale) == (16, 4, 0.25)
    with pytest.raises(ValueError, match="cannot compress FullAttentionSpec"):
        cache_group(STOCK, 3)


def test_memory_for_the_longest_request_and_the_null_block() -> None:
    args = EngineArgs(
        str(MODEL), max_model_len=2048, additional_config={"kv_compress": {"ratio": 4}}
    )
    assert SPEC.max_memory_usage_bytes(args.create_engine_config()) == 129 * SPEC.page_size_bytes
