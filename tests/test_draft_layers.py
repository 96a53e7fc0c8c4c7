# SPDX-License-Identifier: Apache-2.0
"""Layers of a draft model beside those that are judged: the others keep what they would without,
and they keep the first keys and the latest."""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.drafts import first_and_latest
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.ops.reference.rows import State
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Accumulation, Compression, Observed

TARGETS, H, G, D, B, W = 3, 2, 2, 32, 16, 8
BLOCKS = 200


class Side:
    """Requests of one engine, with draft layers or without; K of a draft layer is a position."""

    def __init__(self, config: KVCompressConfig, draft_layers: int, formats: PageFormat) -> None:
        self.layers = TARGETS + draft_layers
        group = CacheGroup(
            self.layers, H, G, D, B, 4, D**-0.5, page_format=formats, draft_layers=draft_layers
        )
        dtype = torch.float32 if formats is PageFormat.AUTO else torch.bfloat16
        self.state = PackedState(
            group, num_blocks=BLOCKS, state_slots=4, observe_slots=2, window=W,
            dtype=dtype, device=torch.device("cpu"), echo=True,
            accumulated=config.query_stride > 0,
        )  # fmt: skip
        self.pages = torch.full((BLOCKS * self.layers * H, B, 2 * D), float("nan"), dtype=dtype)
        self.compressor = Compressor(config, self.state, self.pages)
        self.compressor.record = {}

    def write(self, row: list[int], first: int, vectors: torch.Tensor) -> None:
        """``[n, TARGETS * H, 2 * D]`` of tokens from position ``first`` on."""
        cells = self.pages.view(BLOCKS, self.layers, H, B, 2 * D)
        stored = self.state.echo.view(BLOCKS, self.layers, H, -1)
        for position, vector in enumerate(vectors, first):
            block, place = row[position // B], position % B
            cells[block, :TARGETS, :, place] = vector.view(TARGETS, H, -1)
            cells[block, TARGETS:, :, place] = position / 64
            stored[block, :, :, place] = 0.5
            stored[block, :TARGETS, :, place] = vector.view(TARGETS, H, -1)[..., D].sigmoid()

    def observe(self, slot: int, queries: torch.Tensor) -> None:
        self.state.ring[:TARGETS, slot] = queries

    def positions(self, row: list[int], seq_len: int, layer: int, head: int) -> list[int]:
        slot = self.state.slot_of(row)
        of_head = State(*self.state.tables).head(torch.tensor(row), slot, layer, head)
        keys = of_head.keys(self.pages, seq_len)[:, 0].float() * 64
        return keys.round().long().tolist()


@pytest.mark.parametrize(
    "options, formats",
    [
        ({"policy": "kv_compress"}, PageFormat.AUTO),
        ({"policy": "diverse", "allocator": "layer", "shares": "cake+adakv"}, PageFormat.AUTO),
        ({"policy": "pyramidkv"}, PageFormat.AUTO),
        ({"policy": "echo", "allocator": "uniform"}, PageFormat.AUTO),
        ({"policy": "h2o", "query_stride": 4}, PageFormat.AUTO),
        ({"policy": "kv_compress"}, PageFormat.INT4),
    ],
)
@pytest.mark.parametrize("draft_layers", [1, 2])
def test_others_keep_what_they_would_without(options, formats, draft_layers):
    torch.manual_seed(1)
    config = KVCompressConfig(**{"window": W, "sinks": 4, "recent": 8, **options})
    sides = [Side(config, count, formats) for count in (0, draft_layers)]
    m = formats.blocks_per_page
    step = 4 * m
    rows, seq_lens = [[], []], [0, 0]
    packed = [(0, 0), (0, 0)]
    free = (torch.randperm(BLOCKS - 1) + 1).tolist()
    for covered, kept in [(3 * step, 5), (4 * step, 6), (5 * step, 4)]:
        due = []
        for r in range(2):
            row, first = rows[r], seq_lens[r]
            seq_lens[r] = covered * B + 5 + r
            row += [free.pop() for _ in range(len(row), -(-seq_lens[r] // B))]
            vectors = torch.randn(seq_lens[r] - first, TARGETS * H, 2 * D)
            vectors *= torch.linspace(0.3, 3, TARGETS * H)[:, None]
            queries = torch.randn(TARGETS, W, H * G, D)
            for side in sides:
                side.write(row, first, vectors)
                side.observe(r, queries)
            new = [free.pop() for _ in range(kept + r)]
            observed = Observed(W, 1, 0, 0) if config.query_stride else None
            due.append(
                Compression("ab"[r], 2 + r, r, seq_lens[r], *packed[r], covered, list(row), new,
                            observed=observed, protect=((40, 44),), floor_pages=3)
            )  # fmt: skip
            rows[r] = new + [0] * (covered - len(new)) + row[covered:]
            packed[r] = covered, len(new)
        found = []
        for side in sides:
            # Heads keep what fills the same bytes on either side.
            reports = [x for pending in side.compressor.run(due) for x in pending.collect()]
            found.append([(x.request_id, x.kept_pages, x.lost, x.failure) for x in reports])
        assert found[0] == found[1]
        assert all(failure is None for *_, failure in found[0])
        plain, drafted = (side.compressor.record for side in sides)
        for name in "ab":
            assert all(a.equal(b) for a, b in zip(plain[name], drafted[name], strict=True))
        for r in range(2):
            check_drafts(sides[1], rows[r], seq_lens[r], covered, packed[r][1] * m * B, formats)
    assert len(sides[1].compressor.record["a"]) == TARGETS * H


def check_drafts(side, row, seq_len, covered, kept, formats):
    wanted = [*range(4), *range(covered * B - kept + 4, seq_len)]
    for layer in range(TARGETS, side.layers):
        for head in range(H):
            found = side.positions(row, seq_len, layer, head)
            if formats is PageFormat.AUTO:
                assert found == wanted
            else:  # positions are keys, which codes round, and again
                error = torch.tensor(found) - torch.tensor(wanted)
                assert len(found) == len(wanted) and error.abs().max() <= 2 * seq_len / 15


def test_accumulated_statistics_count_other_layers_only():
    torch.manual_seed(2)
    config = KVCompressConfig(policy="h2o", window=W, query_stride=4)
    sides = [Side(config, count, PageFormat.AUTO) for count in (0, 1)]
    row = list(range(3, 23))
    vectors, queries = torch.randn(320, TARGETS * H, 2 * D), torch.randn(TARGETS, W, H * G, D)
    lost = []
    for side in sides:
        side.write(row, 0, vectors)
        side.observe(0, queries)
        chunk = Accumulation("a", 2, 0, 160, 0, 0, 10, row[:10], observed=Observed(W, 4, 0, 0))
        side.compressor.accumulate([chunk])
        last = Compression("a", 2, 0, 320, 0, 0, 20, row, [50, 51, 52, 53],
                           observed=Observed(W, 4, 10, W))  # fmt: skip
        (pending,) = side.compressor.run([last])
        lost.append([(x.kept_pages, x.lost) for x in pending.collect()])
    assert lost[0] == lost[1]
    plain, drafted = (side.compressor.record["a"] for side in sides)
    assert all(a.equal(b) for a, b in zip(plain, drafted, strict=True))


@pytest.mark.parametrize("candidates, kept, sinks", [(64, 32, 4), (32, 32, 4), (64, 16, 100)])
def test_first_and_latest(candidates, kept, sinks):
    found = first_and_latest(candidates, kept, sinks, torch.device("cpu")).tolist()
    assert len(set(found)) == kept and found == sorted(found)
    assert found == [*range(min(sinks, kept)), *range(candidates - kept + min(sinks, kept),
                                                      candidates)]  # fmt: skip
