# SPDX-License-Identifier: Apache-2.0
"""Compressions that are carried out together: what each keeps, and what the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression import replay
from kvcompress_vllm.compression.batch import MOST_TOKENS, Rank, batches
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Compression

L, H, G, D, B, BLOCKS = 2, 2, 2, 32, 16, 260


class Pool:
    """Three requests of different length, of which the first two are packed already."""

    def __init__(self, policy: str, page_dtype: str, device: str = "cpu") -> None:
        self.config = KVCompressConfig.from_dict(
            {"policy": policy, "page_dtype": page_dtype, "query_stride": 0}
        )
        group = CacheGroup(L, H, G, D, B, 2, D**-0.5, page_format=PageFormat.of(page_dtype))
        torch.manual_seed(3)
        self.state = PackedState(
            group, num_blocks=BLOCKS, state_slots=4, observe_slots=4, window=self.config.window,
            dtype=torch.bfloat16, device=torch.device(device), echo=True,
        )  # fmt: skip
        self.state.ring.normal_()
        assert self.state.echo is not None
        self.state.echo.uniform_()
        pages = torch.empty(group.num_pages(BLOCKS), *group.page_shape, dtype=torch.bfloat16)
        self.compressor = Compressor(self.config, self.state, pages.normal_().to(device))
        self._block = count(1)
        first = [self.due("a", 0, 290), self.due("b", 1, 410)]
        for item in first:
            self.compressor.run([item])
        a, b = first
        self.items = [self.due("a", 0, 290 + 70, a), self.due("b", 1, 410 + 40, b),
                      self.due("c", 2, 333)]  # fmt: skip

    def blocks(self, number: int) -> list[int]:
        return [next(self._block) for _ in range(number)]

    def due(self, name: str, slot: int, length: int, old: Compression | None = None) -> Compression:
        covered = length // (4 * B) * 4  # whole pages of every format
        old_covered, packed = (old.covered, old.new_blocks) if old else (0, [])
        row = (
            packed + [0] * (old_covered - len(packed)) + self.blocks(-(-length // B) - old_covered)
        )
        return Compression(
            name, slot, slot + 1, length, old_covered, len(packed), covered, row,
            self.blocks(3 + slot + (old is not None)),
            unscored=((3, 6), (40, 41)) if old is None else ((length - 5, length - 2),),
        )  # fmt: skip

    def left(self) -> list[torch.Tensor]:
        """All that is stored of keys and about them."""
        state = self.state
        assert state.echo is not None
        stored = [self.compressor.pages, state.echo, state.num_pages[:3], state.first_page[:3]]
        return stored if state.page_scales is None else [*stored, state.page_scales[:3]]


@pytest.mark.parametrize("page_dtype", ["auto", "fp8", "int4"])
@pytest.mark.parametrize("policy", ["echo", "snapkv", "keydiff"])
def test_together_and_alone_are_the_same(policy: str, page_dtype: str) -> None:
    alone, together = Pool(policy, page_dtype), Pool(policy, page_dtype)
    for item in alone.items:
        alone.compressor.run([item])
    together.compressor.run(together.items)
    for a, b in zip(alone.left(), together.left(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_batches_are_as_large_as_the_longest_request() -> None:
    pool = Pool("echo", "auto")
    rank = Rank(pool.state, pool.compressor.pages)
    many = [pool.items[2]] * 30  # 320 candidates each
    assert [len(batch) for batch in batches(many, rank)] == [12, 12, 6]
    assert [len(batch) for batch in batches(many, rank, 2 * MOST_TOKENS)] == [25, 5]


class NumbersByIndex(TorchDispatchMode):
    """Raises where ``tensor[index] = number`` is written, which on a GPU waits until all that was
    launched has been done."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "index_put" in str(func):
            assert args[2].dim() > 0, f"{func} of a number"
        return func(*args, **(kwargs or {}))


def test_the_check_sees_numbers() -> None:
    with NumbersByIndex(), pytest.raises(AssertionError):
        torch.zeros(3)[torch.tensor([1])] = 5.0


def recompressed(pool: Pool) -> None:
    pool.compressor.run(pool.items)


def scored(pool: Pool) -> None:
    pool.compressor.run(pool.items, score_only=True)


def forgotten(pool: Pool) -> None:
    pool.state.release([0, 1])
    replay.clear(pool.state, pool.items[2].old_blocks)


STEPS: list[Callable[[Pool], None]] = [scored, recompressed, forgotten]


@pytest.mark.parametrize("policy", ["echo", "kv_compress", "diverse", "expected_attention"])
def test_no_step_waits_for_the_one_before(policy: str) -> None:
    pool = Pool(policy, "fp8")
    for step in STEPS:
        with NumbersByIndex():
            step(pool)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("step", STEPS)
def test_no_step_waits_on_a_gpu(step: Callable[[Pool], None]) -> None:
    recompressed(Pool("echo", "fp8", "cuda"))  # what is done once may wait
    pool = Pool("echo", "fp8", "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(pool)
    finally:
        torch.cuda.set_sync_debug_mode("default")
