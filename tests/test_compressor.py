# SPDX-License-Identifier: Apache-2.0
"""Compressing again what was compressed before, against a literal implementation of the paper.

The literal side keeps, for every head, the list of its K/V vectors and nothing else: no pages, no
blocks, no state tables. Letters as in ``cache/layout.py``.
"""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Compression
from kvcompress_vllm.records.report import Report

L, H, G, D, B, W = 3, 2, 2, 16, 16, 8
SLOTS = L * H


def scaled(width: int, density: float) -> int:
    """The pooling width where only this share of the positions has a key."""
    return 2 * int(width * density / 2) + 1


class Literal:
    """One request as the papers see it: per head, a list of keys and values."""

    def __init__(self) -> None:
        self.keys = [torch.empty(0, 2 * D) for _ in range(SLOTS)]

    def append(self, vectors: torch.Tensor) -> None:
        """``[n, L * H, 2 * D]`` new tokens."""
        self.keys = [torch.cat([old, vectors[:, i]]) for i, old in enumerate(self.keys)]

    def compress(
        self, config: KVCompressConfig, queries: torch.Tensor, num_tokens: int, kept: int
    ) -> None:
        """Keep ``kept * B`` keys per head on average; ``queries`` ``[W, L * H, G, D]``."""
        # Neighbours are as far apart as keys are rare: on average over the heads.
        of_heads = sum(len(keys) - num_tokens % B for keys in self.keys) / SLOTS
        pool = scaled(config.pool, of_heads / (num_tokens - num_tokens % B))
        tail = num_tokens % B
        recent = max(0, config.recent - tail)
        heads, pages = [], []
        for i, vectors in enumerate(self.keys):
            n = vectors.shape[0]
            score = torch.zeros(n)
            for q in range(W):
                visible = n - (W - 1 - q)
                logits = queries[q, i] @ vectors[:visible, :D].T * D**-0.5
                score[:visible] += logits.softmax(-1).square().sum(0)
            candidates = n - tail
            half = pool // 2
            best = [
                float(score[max(0, j - half) : min(candidates, j + half + 1)].max())
                for j in range(candidates)
            ]
            for j in [*range(config.sinks), *range(candidates - recent, candidates)]:
                best[j] = float("inf")
            order = sorted(range(candidates), key=lambda j: (best[j], j))
            heads.append(order)
            floor = resolve(config).floor_pages(B)
            # Freeing page e costs the score at rank e * B - 1.
            for e in range(1, candidates // B - floor + 1):
                pages.append((best[order[e * B - 1]], i, e))
        free = sum(len(order) for order in heads) // B - kept * SLOTS
        freed = [0] * SLOTS
        for _, i, _ in sorted(pages)[:free]:
            freed[i] += 1
        for i, order in enumerate(heads):
            gone = set(order[: freed[i] * B])
            keep = [j for j in range(self.keys[i].shape[0]) if j not in gone]
            self.keys[i] = self.keys[i][keep]


class Paged:
    """The same request in pages, compressed by the product."""

    def __init__(self, config: KVCompressConfig) -> None:
        self.state = PackedState(
            CacheGroup(L, H, G, D, B, 4, D**-0.5), num_blocks=200,
            state_slots=4, observe_slots=2, window=W, dtype=torch.float32,
            device=torch.device("cpu"), echo=True,
        )  # fmt: skip
        self.pages = torch.full((200 * SLOTS, B, 2 * D), float("nan"))
        self.compressor = Compressor(config, self.state, self.pages)
        self.free = (torch.randperm(199) + 1).tolist()
        self.row: list[int] = []
        self.num_tokens = self.covered = self.kept = 0

    def append(self, vectors: torch.Tensor) -> None:
        for vector in vectors:
            if self.num_tokens % B == 0:
                self.row.append(self.free.pop())
            page = self.row[-1] * SLOTS + torch.arange(SLOTS)
            self.pages[page, self.num_tokens % B] = vector
            # Any number that goes with its key will do for one.
            self.state.echo[page, self.num_tokens % B] = vector[:, D].sigmoid()
            self.num_tokens += 1

    def compress(self, queries: torch.Tensor, kept: int) -> list[Report]:
        slot = 1
        for q in range(W):
            place = (self.num_tokens - W + q) % W
            self.state.ring[:, slot, place] = queries[q].view(L, H * G, D)
        new = [self.free.pop() for _ in range(kept)]
        covered = self.num_tokens // B
        item = Compression(
            "r", 2, slot, self.num_tokens, self.covered, self.kept, covered, list(self.row), new
        )
        reports = [r for pending in self.compressor.run([item]) for r in pending.collect()]
        self.row[:covered] = new + [0] * (covered - kept)
        self.covered, self.kept = covered, kept
        return reports

    def keys(self, index: int) -> torch.Tensor:
        slot = self.state.slot_of(self.row)
        packed = int(self.state.num_pages[slot].flatten()[index])
        first = int(self.state.first_page[slot].flatten()[index])
        n = layout.num_keys(self.num_tokens, self.covered, packed, B)
        ids = layout.page_id(
            torch.tensor(self.row), self.covered, packed, first, index, SLOTS,
            torch.arange(-(-n // B)),
        )  # fmt: skip
        return self.pages[ids].flatten(0, 1)[:n]


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
@pytest.mark.parametrize(
    "pool, recent", [(1, 16), (7, 0), (25, 16)]
)  # a shield hides the pool's edges
def test_compressing_again_and_again_equals_the_literal_algorithm(
    allocator: str, pool: int, recent: int
) -> None:
    torch.manual_seed(3)
    config = KVCompressConfig(
        policy="kv_compress", window=W, pool=pool, recent=recent, allocator=allocator
    )
    paged, literal = Paged(config), Literal()
    for num_new, kept in [(333, 5), (70, 6), (16, 6), (200, 4), (9, 4), (35, 5)]:
        # Keys of very different length make heads keep very different numbers.
        vectors = torch.randn(num_new, SLOTS, 2 * D) * torch.linspace(0.3, 4, SLOTS)[:, None]
        queries = torch.randn(W, SLOTS, G, D)
        paged.append(vectors)
        literal.append(vectors)
        paged.compress(queries, kept)
        if allocator == "global":
            literal.compress(config, queries, paged.num_tokens, kept)
        for i in range(SLOTS):
            if allocator == "global":
                assert paged.keys(i).equal(literal.keys[i]), (num_new, i)
            assert not paged.keys(i).isnan().any()
        pages = paged.state.num_pages[2]
        if allocator == "uniform":
            assert pages.eq(kept).all()
        elif allocator == "layer":
            assert pages.sum(-1).eq(kept * H).all()
        else:
            assert int(pages.sum()) == kept * SLOTS and not pages.eq(kept).all()


def two_requests(config: KVCompressConfig, policies: list[str | None]) -> torch.Tensor:
    """Packed pages of two requests of the same content that choose these policies."""
    torch.manual_seed(5)
    state = Paged(config).state
    pages = torch.randn(200 * SLOTS, B, 2 * D)
    compressor = Compressor(config, state, pages)
    state.ring.normal_()
    due = [
        Compression(
            "ab"[slot], slot, slot, 900, 0, 0, 56, list(range(1, 58)), list(range(new, new + 3)),
            policy=policy,
        )
        for slot, new, policy in zip([0, 1], [100, 110], policies, strict=True)
    ]  # fmt: skip
    state.ring[:, 1] = state.ring[:, 0]
    compressor.run(due)
    return torch.stack([pages[first * SLOTS : (first + 3) * SLOTS] for first in (100, 110)])


def test_requests_of_one_step_may_use_different_policies() -> None:
    config = KVCompressConfig(window=W, ratio=20, allow_policies=True)
    mixed = two_requests(config, ["tova", None])
    assert mixed[1].equal(two_requests(config, [None, None])[1])
    assert mixed[0].equal(two_requests(config.with_policy("tova"), [None, None])[0])
    assert not mixed[0].equal(mixed[1])


def test_many_compressions_at_once_equal_each_on_its_own() -> None:
    """Batches are bounded in memory; where they are cut must not matter."""
    torch.manual_seed(4)
    config = KVCompressConfig(window=W)

    def run(most_blocks: int, longest: int = 0) -> torch.Tensor:
        torch.manual_seed(5)
        state = Paged(config).state
        pages = torch.randn(200 * SLOTS, B, 2 * D)
        compressor = Compressor(config, state, pages, longest=longest)
        state.ring.normal_()
        due = [
            Compression(name, slot, slot, length, 0, 0, length // B, list(row), list(new))
            for name, slot, length, row, new in [
                ("a", 0, 500, range(1, 33), range(150, 154)),
                ("b", 1, 900, range(40, 97), range(160, 163)),
            ]
        ]
        from kvcompress_vllm.compression import batch as module

        limit, module.MOST_TOKENS = module.MOST_TOKENS, most_blocks * B
        try:
            compressor.run(due)
        finally:
            module.MOST_TOKENS = limit
        return torch.cat([pages[150 * SLOTS :].flatten(), state.num_pages[:2].flatten().float()])

    assert run(1).equal(run(1000))
    assert run(1, longest=1000 * B).equal(run(1000))
