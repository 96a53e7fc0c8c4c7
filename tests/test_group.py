# SPDX-License-Identifier: Apache-2.0
"""Records of a step reach the compressor of the group that they name, and no other."""

import pytest
import torch

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.step import start_step
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Compression, PackedRow, StepPlan


def compressor(group: CacheGroup) -> Compressor:
    state = PackedState(
        group, num_blocks=40, state_slots=2, observe_slots=1, window=8, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    state.ring.normal_()
    pages = torch.randn(group.num_pages(40), *group.page_shape)
    return Compressor(KVCompressConfig(policy="kv_compress", window=8), state, pages)


def test_sizes() -> None:
    group = CacheGroup(
        layers=3, heads=2, queries_per_head=4, head_size=64, block_size=16, itemsize=2, scale=0.125
    )
    assert group.page_shape == (16, 128) and group.page_bytes == 4096
    assert group.pages_per_block == 6 and group.block_bytes == 6 * 4096
    assert group.num_pages(10) == 60


def test_each_group_is_compressed_by_its_own_records() -> None:
    """Two kinds of attention of one request: other layers, blocks and amounts kept."""
    torch.manual_seed(0)
    full = compressor(CacheGroup(2, 2, 2, 16, 16, 4, 0.25, index=0))
    other = compressor(CacheGroup(1, 4, 1, 32, 8, 4, 0.2, index=1))
    plan = StepPlan(
        compressions=[
            Compression("r", 1, 0, 160, 0, 0, 20, list(range(1, 21)), list(range(30, 34)), group=1),
            Compression("r", 1, 0, 160, 0, 0, 10, list(range(5, 15)), [20, 21, 22], group=0),
        ],
        expected=[
            PackedRow("r", 1, 10, [20, 21, 22], group=0),
            PackedRow("r", 1, 20, [30, 31, 32, 33], group=1),
        ],
    )
    pending = start_step(plan, [full, other])
    kept = [torch.tensor(item.collect()[0].kept_pages) for item in pending]
    assert [tuple(pages.shape) for pages in kept] == [(2, 2), (1, 4)]
    assert [int(pages.sum()) for pages in kept] == [3 * 4, 4 * 4]
    assert (int(full.state.covered[1]), int(other.state.covered[1])) == (10, 20)
    start_step(StepPlan(released=[1], expected=[]), [full, other])
    assert full.state.slots == other.state.slots == {}


def test_a_group_that_is_not_told_of_a_compression_says_so() -> None:
    group = CacheGroup(1, 2, 1, 16, 16, 4, 0.25, index=1)
    plan = StepPlan(
        compressions=[Compression("r", 0, 0, 160, 0, 0, 10, list(range(1, 11)), [20, 21])],
        expected=[PackedRow("r", 0, 10, [20, 21], group=1)],
    )
    with pytest.raises(RuntimeError, match=r"knows packed slots \{0: 20\}, the worker \{\}"):
        start_step(plan, [compressor(group)])
