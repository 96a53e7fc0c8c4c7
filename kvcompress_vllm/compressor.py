# SPDX-License-Identifier: Apache-2.0
"""Compression of the due requests of a step: observe (done), score, allocate, select, compact.

Letters as in ``kvcompress_vllm/layout.py``. Runs before the step's forward, on its stream. The
scheduler has fixed how many blocks each request keeps; this decides which keys they hold.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kvcompress_vllm import allocation, budget, gather, ops
from kvcompress_vllm.config import KVCompressConfig
from kvcompress_vllm.plan import Compression
from kvcompress_vllm.policies import Evidence
from kvcompress_vllm.state import PackedState


class Compressor:
    """Carries out compressions on one rank.

    Args:
        config: the resolved options.
        state: this rank's tables, changed by :meth:`run`.
        pages: ``[P, B, 2 * D]`` page pool, changed by :meth:`run`.
        scale: factor on the attention logits.
    """

    def __init__(
        self, config: KVCompressConfig, state: PackedState, pages: Tensor, scale: float
    ) -> None:
        self.config = config
        self.state = state
        self.pages = pages
        self.scale = scale
        self.policy = config.create_policy()
        self.record: dict[str, list[Tensor]] | None = None
        """For tests, when not None: by request id, the kept key indices of every (layer, head)."""

    def run(self, due: list[Compression]) -> None:
        """Compress every due request and describe it in the state tables."""
        if not due:
            return
        state, device = self.state, self.pages.device
        layers, heads = state.num_pages.shape[1:]
        slots, block_size = layers * heads, self.pages.shape[1]
        covered = [item.covered for item in due]
        kept = [len(item.new_blocks) for item in due]
        starts = _starts([count * slots for count in covered])

        def int32(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        rows = _rows([item.old_blocks for item in due], device)
        state_slot = state.state_slots(rows)
        tables = (state_slot, *state.tables)
        new_covered = int32(covered)
        page_start = torch.tensor(starts[:-1], device=device)

        num_tokens = [item.num_tokens for item in due]
        statistics = ops.attention_statistics(
            state.ring,
            self.pages,
            rows,
            int32(num_tokens),
            *tables,
            int32([item.observe_slot for item in due]),
            int32([min(state.window, count) for count in num_tokens]),
            new_covered,
            page_start,
            starts[-1],
            ops.channel_mask(self.policy.channels),
            1,
            self.scale,
        )

        recent = [
            budget.num_recent(self.config, count, blocks, block_size)
            for count, blocks in zip(num_tokens, covered, strict=True)
        ]
        floor_pages = budget.floor_pages(self.config, block_size)
        scores = torch.empty(starts[-1], block_size, device=device)
        freed = []
        for index, (begin, end) in enumerate(pairwise(starts)):
            evidence = self._evidence(
                due[index], rows[index], statistics[:, begin:end], recent[index]
            )
            score = self.policy.score(evidence)
            scores[begin:end] = score.reshape(-1, block_size)
            freed.append(
                allocation.freed_pages(
                    self.config.allocator, self.policy, evidence, score, block_size, floor_pages
                )
            )
        kept_pages, kept_first, kept_keys = ops.select_pages(
            scores,
            page_start,
            *tables,
            new_covered,
            torch.stack(freed),
            int32(recent),
            self.config.sinks,
            floor_pages,
            sum(kept) * slots,
        )
        ops.compact_pages(
            self.pages,
            rows,
            *tables,
            kept_pages,
            kept_first,
            kept_keys,
            _rows([item.new_blocks for item in due], device),
        )
        state.install(
            [item.state_slot for item in due],
            [item.new_blocks for item in due],
            covered,
            kept_pages,
        )
        if self.record is not None:
            keys = kept_keys.split(kept_pages.flatten().tolist())
            for index, item in enumerate(due):
                heads_of = keys[index * slots : (index + 1) * slots]
                self.record[item.request_id] = [head.flatten() for head in heads_of]

    def _evidence(
        self, item: Compression, row: Tensor, statistics: Tensor, num_recent: int
    ) -> Evidence:
        """What the policy may look at; ``statistics`` ``[channels, pages, B]`` of the request."""
        state, policy = self.state, self.policy
        layers, heads = state.num_pages.shape[1:]
        num_queries = min(state.window, item.num_tokens)
        if policy.needs_keys and state.slot_of(item.old_blocks) >= 0:
            raise RuntimeError(
                f"kv_compress: {item.request_id} is packed already; {type(policy).__name__} reads "
                "keys by position"
            )
        keys, values, queries = gather.readers(
            self.pages, row, item.num_tokens, heads, state.ring, item.observe_slot, num_queries
        )
        return Evidence(
            layers=layers,
            heads=heads,
            group=state.ring.shape[3] // heads,
            num_keys=item.covered * self.pages.shape[1],
            num_kept=len(item.new_blocks) * self.pages.shape[1],
            seq_len=item.num_tokens,
            num_queries=num_queries,
            num_sinks=self.config.sinks,
            num_recent=num_recent,
            scale=self.scale,
            device=self.pages.device,
            statistics={
                channel: values_of.reshape(layers * heads, -1)
                for channel, values_of in zip(sorted(policy.channels), statistics, strict=True)
            },
            keys=keys,
            values=values,
            queries=queries,
        )


def _rows(blocks: list[list[int]], device: torch.device) -> Tensor:
    """``[R, M]`` int32, ragged rows padded with the null block."""
    width = max(map(len, blocks))
    padded = [row + [0] * (width - len(row)) for row in blocks]
    return torch.tensor(padded, dtype=torch.int32, device=device)


def _starts(counts: list[int]) -> list[int]:
    """Exclusive prefix sums, and the total last."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
