# SPDX-License-Identifier: Apache-2.0
"""Compression of the due requests of a step: observe (done), score, allocate, select, compact.

Letters as in ``kvcompress_vllm/layout.py``. Runs before the step's forward, on its stream. The
scheduler has fixed how many blocks each request keeps; this decides which keys they hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress_vllm import budget, ops, policies
from kvcompress_vllm.config import KVCompressConfig
from kvcompress_vllm.plan import Compression
from kvcompress_vllm.state import PackedState
from kvcompress_vllm.transfer import to_device


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
        self.policy = policies.create(config.policy, config.pool)
        self.record: dict[str, list[Tensor]] | None = None
        """For tests, when not None: by request id, the kept key indices of every (layer, head)."""

    def run(self, due: list[Compression]) -> None:
        """Compress every due request and describe it in the state tables."""
        for batch in _batches(due, MOST_TOKENS // self.pages.shape[1]):
            self._run(batch)

    def _run(self, due: list[Compression]) -> None:
        state, device = self.state, self.pages.device
        layers, heads = state.num_pages.shape[1:]
        slots, block_size = layers * heads, self.pages.shape[1]
        covered = [item.covered for item in due]
        kept = [len(item.new_blocks) for item in due]
        starts = _starts([item.candidate_blocks * slots for item in due])

        def int32(values: list[int]) -> Tensor:
            return to_device(values, torch.int32, device)

        rows = _rows([item.old_blocks for item in due], device)
        state_slot = state.state_slots(rows)
        tables = (state_slot, *state.tables)
        new_covered = int32(covered)
        page_start = to_device(starts[:-1], torch.int64, device)

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
            self.scale,
        )

        scores = torch.empty(starts[-1], block_size, device=device)
        for item, (begin, end) in zip(due, pairwise(starts), strict=True):
            scores[begin:end] = self._score(item, statistics[:, begin:end])

        recent = [
            budget.num_recent(self.config, count, blocks, block_size)
            for count, blocks in zip(num_tokens, covered, strict=True)
        ]
        kept_pages, kept_first, kept_keys = ops.select_pages(
            scores,
            page_start,
            *tables,
            new_covered,
            self._num_freed(due, layers, heads),
            int32(recent),
            self.config.sinks,
            budget.floor_pages(self.config, block_size),
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

    def _score(self, item: Compression, statistics: Tensor) -> Tensor:
        """Scores of one request's candidate keys.

        Args:
            statistics: ``[channels, pages, B]`` of this request; heads may differ in length.

        Returns:
            ``[pages, B]`` fp32.
        """
        channels, pages, block_size = statistics.shape
        layers, heads = self.state.num_pages.shape[1:]
        slots = layers * heads
        if not item.old_kept:  # all heads have the same length
            scores = self.policy.score(statistics.reshape(channels, slots, -1))
            return scores.view(pages, block_size)
        # Policies see one rectangle, shorter heads filled up with keys that nobody attends to. How
        # long the longest head is only the device knows: no longer than before it was packed.
        fresh = item.covered - item.old_covered
        width = item.covered
        device = statistics.device
        lengths = self.state.num_pages[item.state_slot].view(slots, 1) + fresh
        first = self.state.first_page[item.state_slot].view(slots, 1)
        first = first + torch.arange(slots, device=device).unsqueeze(1) * fresh
        j = torch.arange(width, device=device)
        place = torch.where(j < lengths, first + j, pages).flatten().long()
        padded = torch.cat([statistics, statistics.new_zeros(channels, 1, block_size)], dim=1)
        scores = self.policy.score(padded[:, place].reshape(channels, slots, width * block_size))
        result = torch.empty(pages + 1, block_size, device=device)
        result[place] = scores.view(-1, block_size)
        return result[:pages]

    def _num_freed(self, due: list[Compression], layers: int, heads: int) -> Tensor:
        """``[R, A]`` int32 pages to free per group of competing heads."""
        groups = {"global": 1, "layer": layers, "uniform": layers * heads}[self.config.allocator]
        pages = layers * heads // groups
        freed = [[(item.candidate_blocks - len(item.new_blocks)) * pages] * groups for item in due]
        return to_device(freed, torch.int32, self.pages.device)


MOST_TOKENS = 4096
"""Candidate tokens of a batch of compressions, unless a single request has more. Bounds the memory
for statistics and scores without making many small compressions wait for each other."""


BYTES_PER_KEY = 4 * (ops.NUM_CHANNELS + 5)
"""Scratch per candidate key: its statistics, its score, and the policy's temporaries."""


def scratch_bytes(num_tokens: int, num_heads: int) -> int:
    """Memory that a compression takes while it runs.

    Args:
        num_tokens: tokens of the longest request.
        num_heads: L * H.
    """
    return max(num_tokens, MOST_TOKENS) * num_heads * BYTES_PER_KEY


def _batches(due: list[Compression], most_blocks: int) -> Iterator[list[Compression]]:
    """Runs of requests with at most ``most_blocks`` candidate blocks, or of a single request."""
    batch: list[Compression] = []
    blocks = 0
    for item in due:
        if batch and blocks + item.candidate_blocks > most_blocks:
            yield batch
            batch, blocks = [], 0
        batch.append(item)
        blocks += item.candidate_blocks
    if batch:
        yield batch


def _rows(blocks: list[list[int]], device: torch.device) -> Tensor:
    """``[R, M]`` int32, ragged rows padded with the null block."""
    width = max(map(len, blocks))
    padded = [row + [0] * (width - len(row)) for row in blocks]
    return to_device(padded, torch.int32, device)


def _starts(counts: list[int]) -> list[int]:
    """Exclusive prefix sums, and the total last."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
