# SPDX-License-Identifier: Apache-2.0
"""Compressing again and again with packed pages of every format, against lists of positions.

The literal side knows positions and the vectors that were computed for them, no pages. Letters as
in ``cache/layout.py``.
"""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm.cache.integrity import check_state
from kvcompress_vllm.cache.page_format import PageFormat, to_stored
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression import gather
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.ops.reference.rows import State
from kvcompress_vllm.policies import BUILT_IN, observing_all
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.plan import Compression, Observed, PackedRow

L, H, G, D, B, W = 2, 2, 2, 32, 16, 8
SLOTS, BLOCKS = L * H, 300
SLOT = 2


class Request:
    """One request in a page pool, and what it should hold."""

    def __init__(self, policy: str, page_format: PageFormat, **options: object) -> None:
        self.config = KVCompressConfig(
            policy=policy, page_dtype=page_format.label, window=W, **{"recent": 16, **options}
        )
        stride = self.config.query_stride
        self.state = PackedState(
            CacheGroup(L, H, G, D, B, 2, D**-0.5, page_format=page_format), num_blocks=BLOCKS,
            state_slots=4, observe_slots=2, window=W, dtype=torch.bfloat16,
            device=torch.device("cpu"), echo=True, accumulated=stride > 0,
        )  # fmt: skip
        self.pages = torch.full((BLOCKS * SLOTS, B, 2 * D), float("nan"), dtype=torch.bfloat16)
        self.compressor = Compressor(self.config, self.state, self.pages)
        self.compressor.record = {}
        self.free = (torch.randperm(BLOCKS - 1) + 1).tolist()
        self.row: list[int] = []
        self.packing = Packing()
        self.vectors = torch.empty(0, SLOTS, 2 * D)
        """Of every token, as it was computed."""
        self.held = [torch.empty(0, dtype=torch.long) for _ in range(SLOTS)]
        """By head, positions of the packed keys."""

    @property
    def num_tokens(self) -> int:
        return len(self.vectors)

    def append(self, vectors: torch.Tensor) -> None:
        for vector in vectors.bfloat16():
            if self.num_tokens % B == 0:
                self.row.append(self.free.pop())
            page = self.row[-1] * SLOTS + torch.arange(SLOTS)
            place = self.num_tokens % B
            self.pages[page, place] = vector
            self.state.echo[page, place] = (self.num_tokens + 1) / 8192
            self.vectors = torch.cat([self.vectors, vector.float()[None]])

    def compress(self, kept: int, protect: tuple = ()) -> None:
        m = self.state.page_format.blocks_per_page
        covered = self.num_tokens // (B * m) * m
        kept = min(kept, self.packing.all_kept(covered, m))
        self.state.ring[:, 1] = torch.randn(L, W, H * G, D).bfloat16()
        new = [self.free.pop() for _ in range(kept)]
        observed = Observed(W, 1, covered, 0) if self.config.query_stride else None
        item = Compression(
            "r", SLOT, 1, self.num_tokens, *self.packing, covered, list(self.row), new,
            protect=protect, observed=observed,
            floor_pages=min(
                resolve(self.config)._replace(protect=protect).floor_pages(B, covered),
                self.packing.all_kept(covered, m),
            ),
        )  # fmt: skip
        (report,) = [r for pending in self.compressor.run([item]) for r in pending.collect()]
        assert report.failure is None and sum(map(sum, report.kept_pages)) == kept * SLOTS
        assert 0 <= report.lost <= 1
        fresh = torch.arange(self.packing.covered * B, covered * B)
        for i, keys in enumerate(self.compressor.record["r"]):
            self.held[i] = torch.cat([self.held[i], fresh])[keys.long()]
        self.free += self.row[: self.packing.kept] + self.row[self.packing.covered : covered]
        self.row[:covered] = new + [0] * (covered - kept)
        self.packing = Packing(covered, kept)
        check_state(self.state, [PackedRow("r", SLOT, covered, new)])

    def check(self) -> None:
        """Every head holds what it kept, within a step of what was computed, and its numbers."""
        state, page_format = self.state, self.state.page_format
        table = State(*state.tables)
        for i, held in enumerate(self.held):
            head = table.head(torch.tensor(self.row), SLOT, *divmod(i, H))
            position = torch.cat([held, torch.arange(self.packing.covered * B, self.num_tokens)])
            assert (position.diff() > 0).all()
            found = head.keys(self.pages, self.num_tokens).float()
            wanted = self.vectors[position, i]
            assert found.shape == wanted.shape
            packed = len(held)
            assert found[packed:].equal(wanted[packed:])
            error = (found - wanted)[:packed].abs()
            if page_format is PageFormat.AUTO:
                assert not error.any()
            elif page_format is PageFormat.FP8:
                scale = state.page_scales[SLOT].flatten(0, 1)[i].float().repeat_interleave(D, 1)[0]
                # Half a step of 3 bits of mantissa, once more for each time that a scale doubled.
                assert (error <= 2**-3 * wanted[:packed].abs() + 2**-9 * scale).all()
            else:
                scale, _ = state.page_scales[SLOT].flatten(0, 1)[i].float()
                error = to_stored(found - wanted, page_format)[:packed].abs()
                # No more than a few lay beyond what codes reached when they were packed.
                assert (error > 1.01 * scale + 1e-6).float().mean() < 0.1
            if not self.config.reads_echo():
                continue
            page, within = head.place(torch.arange(len(position)), B)
            assert state.echo[page, within].equal((position + 1) / 8192)

    def check_gather(self) -> None:
        """Copies for policies are what attention sees, at the right edge."""
        keys, values, _ = gather.readers(
            self.pages, torch.tensor(self.row), self.num_tokens, self.state, 1, W,
            gather.Packed(SLOT, self.packing.covered),
        )  # fmt: skip
        table = State(*self.state.tables)
        for layer in range(L):
            copied = torch.cat([keys(layer), values(layer)], -1)
            for h in range(H):
                head = table.head(torch.tensor(self.row), SLOT, layer, h)
                own = head.keys(self.pages, self.num_tokens).to(copied.dtype)
                assert copied[h, self.num_tokens - len(own) :].equal(own)
                assert not copied[h, : self.num_tokens - len(own)].any()


@pytest.mark.parametrize("page_format", list(PageFormat))
@pytest.mark.parametrize("policy", ["echo", "kv_compress", "diverse", "expected_attention"])
def test_what_is_kept_stays_where_it_should(policy: str, page_format: PageFormat) -> None:
    torch.manual_seed(3)
    request = Request(policy, page_format)
    protect = ((70, 100), (600, 640))
    # The first compression keeps everything that it can; then heads keep very different numbers.
    for num_new, kept in [(333, 20), (70, 6), (5, 5), (300, 7), (150, 6)]:
        vectors = torch.randn(num_new, SLOTS, 2 * D) * torch.linspace(0.3, 4, SLOTS)[:, None]
        request.append(vectors)
        request.compress(kept, protect)
        request.check()
        request.check_gather()
        for held in request.held:
            for start, end in protect:
                inside = torch.tensor(range(start, min(end, request.packing.covered * B)))
                assert torch.isin(inside, held).all()
            assert torch.isin(torch.arange(4), held).all()
    pages = request.state.num_pages[SLOT]
    assert int(pages.sum()) == 6 * SLOTS


@pytest.mark.parametrize("page_format", [PageFormat.FP8, PageFormat.INT4])
@pytest.mark.parametrize("sinks, recent", [(4, 1000), (1000, 0), (100, 100)])
@pytest.mark.parametrize("policy", BUILT_IN)
def test_shields_may_be_longer_than_what_there_is(
    policy: str, sinks: int, recent: int, page_format: PageFormat
) -> None:
    """What is packed in fewer bits is so before the shields are full, and keeps all keys."""
    torch.manual_seed(6)
    stride = {"query_stride": 1} if policy in observing_all() else {}
    request = Request(policy, page_format, sinks=sinks, recent=recent, **stride)
    for num_new in (70, 64):
        request.append(torch.randn(num_new, SLOTS, 2 * D))
        request.compress(BLOCKS)
        request.check()
        assert all(held.tolist() == [*range(request.packing.covered * B)] for held in request.held)


@pytest.mark.parametrize("page_format", [PageFormat.FP8, PageFormat.INT4])
def test_twenty_rounds_move_nothing_by_more_than_a_step(page_format: PageFormat) -> None:
    torch.manual_seed(4)
    request = Request("kv_compress", page_format)
    for round_ in range(20):
        vectors = torch.randn(128, SLOTS, 2 * D)
        vectors[64, :, round_] *= 2 ** (round_ / 3)  # now and then one that is much larger
        request.append(vectors)
        request.compress(4)
        request.check()


def test_accumulated_statistics_move_with_their_keys() -> None:
    torch.manual_seed(5)
    request = Request("h2o", PageFormat.INT4, query_stride=1)
    for num_new, kept in [(400, 4), (130, 4), (64, 4)]:
        request.append(torch.randn(num_new, SLOTS, 2 * D))
        request.compress(kept)
        request.check()
        accumulated = request.state.accumulated
        blocks = torch.tensor(request.row[:kept])
        stored = accumulated.view(BLOCKS, -1, 4)[blocks]
        # Every key that is kept was seen by one query at least, and by all that were counted.
        assert (stored[..., -1] >= 1).all()
