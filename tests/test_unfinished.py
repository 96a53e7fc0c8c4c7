# SPDX-License-Identifier: Apache-2.0
"""Queries of unfinished segments in blocks of the cache, and back."""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.batch import Rank
from kvcompress_vllm.compression.unfinished import load, save
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import SavedQueries

L, H, D, B, W, N = 3, 2, 8, 16, 256, 40


@pytest.mark.parametrize("queries_per_head", [1, 2, 3, 4, 7, 16])
def test_what_is_loaded_is_what_was_saved(queries_per_head: int) -> None:
    """Bit by bit, into another slot; no other block and no other place is touched."""
    group = CacheGroup(L, H, queries_per_head, D, B, 2, 1.0)
    state = PackedState(
        group, num_blocks=N, state_slots=2, observe_slots=3, window=W, dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # fmt: skip
    state.ring.normal_()
    pages = torch.randn(N * L * H, B, 2 * D).to(torch.bfloat16)
    rank, before, ring = Rank(state, pages), pages.clone(), state.ring.clone()
    each, first, count = -(-queries_per_head // 2), 5 * W + 2 * B, 3 * B
    blocks = torch.randperm(N)[: 3 * each].tolist()
    save(rank, [SavedQueries("a", 2, first, count, blocks)])
    changed = (pages != before).view(N, -1).any(1).nonzero().flatten().tolist()
    assert sorted(changed) == sorted(blocks)
    assert state.ring.equal(ring)
    load(rank, [SavedQueries("b", 0, first, count, blocks)])
    assert state.ring[:, 0, 2 * B : 5 * B].equal(ring[:, 2, 2 * B : 5 * B])
    ring[:, 0, 2 * B : 5 * B] = ring[:, 2, 2 * B : 5 * B]
    assert state.ring.equal(ring)
