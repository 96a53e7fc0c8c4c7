# SPDX-License-Identifier: Apache-2.0
"""Memory that is set aside for a compression is enough for it, whatever the policy."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kvcompress_vllm import policies
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.batch import MOST_TOKENS
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.scratch import scratch_bytes, usable_policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Compression

L, H, G, D, B = 6, 2, 2, 32, 16
TOKENS = MOST_TOKENS + 100
BLOCKS = TOKENS // B


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors made while it is active; what ops use inside is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Storages of arguments were there before.
        known = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._seen:
                    self._seen[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)


def peak(policy: str, kind: str) -> tuple[int, int]:
    """Bytes that a compression takes at most, and those set aside: of one long prompt, of one that
    was compressed before, or of four together that are as long."""
    config = KVCompressConfig.from_dict({"policy": policy, "query_stride": 0, "window": 8})
    state = PackedState(
        CacheGroup(L, H, G, D, B, 2, D**-0.5), num_blocks=2 * BLOCKS,
        state_slots=4, observe_slots=1, window=8, dtype=torch.bfloat16, device=torch.device("cpu"),
        echo=True,
    )  # fmt: skip
    state.ring.normal_()
    pages = torch.empty(2 * BLOCKS * L * H, B, 2 * D, dtype=torch.bfloat16).normal_()
    compressor = Compressor(config, state, pages, longest=TOKENS)
    row = list(range(1, BLOCKS + 2))
    spare = list(range(BLOCKS + 2, 2 * BLOCKS))
    old_covered = old_kept = 0
    if kind == "again":
        # Most of it is still there: heads of uneven length, nearly as many keys as tokens.
        old_covered, old_kept = BLOCKS - 1, BLOCKS - 5
        packed = spare[:old_kept]
        compressor.run([Compression("a", 0, 0, TOKENS, 0, 0, old_covered, row, packed)])
        spare = row[:old_covered]
        row = packed + [0] * (old_covered - old_kept) + row[old_covered:]
    new = spare[: BLOCKS // 4]
    due = [Compression("a", 0, 0, TOKENS, old_covered, old_kept, BLOCKS, row, new)]
    if kind == "many":
        part = BLOCKS // 4
        due = [
            Compression(str(i), i, 0, part * B, 0, 0, part, row[i * part :][:part],
                        new[i * part // 4 :][: part // 4])
            for i in range(4)
        ]  # fmt: skip
    with LiveBytes() as counted:
        reports = compressor.run(due)
    del reports
    return counted.peak, scratch_bytes(compressor.policy, TOKENS, compressor.group)


@pytest.mark.parametrize("kind", ["first", "again", "many"])
@pytest.mark.parametrize("policy", policies.BUILT_IN)
def test_scratch_is_enough(policy: str, kind: str) -> None:
    taken, reserved = peak(policy, kind)
    assert (0.1 if kind == "many" else 0.2) * reserved < taken <= reserved, (
        f"{taken / reserved:.2f}"
    )


def test_what_requests_may_choose_counts() -> None:
    def names(**options: Any) -> set[str]:
        config = KVCompressConfig.from_dict(options)
        return {type(policy).__name__ for policy in usable_policies(config)}

    assert names() == {"Echo"}
    assert names(allow_policies="expected_attention") == {"Echo", "ExpectedAttention"}
    assert len(names(allow_policies=True)) >= len(policies.BUILT_IN) - 3  # some are only shares
