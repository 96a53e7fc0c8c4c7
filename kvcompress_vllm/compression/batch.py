# SPDX-License-Identifier: Apache-2.0
"""Requests that are compressed together. Letters as in ``cache/layout.py``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.policies.base import Policy
from kvcompress_vllm.records import budget
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Accumulation, Judged

Item = TypeVar("Item", bound=Accumulation)

MOST_TOKENS = 4096
"""Candidate tokens of a batch of compressions, unless the longest request has more. Bounds the
memory for statistics and scores; the fewer batches, the less has to be launched."""


class Rank(NamedTuple):
    """What compressions of one rank and cache group read and change."""

    state: PackedState
    pages: Tensor
    """``[P, B, 2 * D]``."""

    @property
    def group(self) -> CacheGroup:
        """Whose pages these are."""
        return self.state.group

    def candidate_units(self, item: Accumulation) -> int:
        """Candidate keys of a request per head, on average, in units of B."""
        return item.old_kept * self.group.blocks_per_page + item.covered - item.old_covered

    def candidate_pages(self, item: Judged) -> int:
        """The same in packed pages, which all of them would take."""
        return item.old_packing.all_kept(item.covered, self.group.blocks_per_page)


@dataclass(frozen=True)
class Batch(Generic[Item]):
    """Requests that one policy judges, with one floor, observed alike."""

    items: Sequence[Item]
    config: KVCompressConfig
    policy: Policy
    floor_pages: int
    """Packed pages that every head keeps."""
    rows: Tensor
    """``[R, M]`` int32 block ids."""
    state_slot: Tensor
    """``[R]`` int32, -1: never packed."""
    covered: Tensor
    """``[R]`` int32, F afterwards."""
    unit_start: Tensor
    """``[R]`` int64, first candidate unit of every request: B keys are one."""
    spans: list[tuple[int, int]]
    """The same on the host: candidate units ``[begin, end)`` of every request."""
    sinks: int
    """First candidate keys of every head that are shielded; no more than every head keeps."""
    recent: list[int]
    """Candidate keys at the end of every head that the recent window shields; with the sinks no
    more than every head keeps, which of a short request in few bits are all of its keys."""

    @classmethod
    def of(
        cls,
        items: Sequence[Item],
        config: KVCompressConfig,
        policy: Policy,
        rank: Rank,
        floor_pages: int | None = None,
    ) -> Batch[Item]:
        """Put what the ops read on the device.

        Args:
            floor_pages: None: as configured.
        """
        device, size = rank.pages.device, rank.group.block_size
        floor_pages = floor_pages or resolve(config).floor_pages(size)
        shielded = floor_pages * rank.group.page_keys
        sinks = min(config.sinks, shielded)
        rows = padded_rows([item.old_blocks for item in items], device)
        starts = _starts(rank.candidate_units(item) * rank.group.pages_per_block for item in items)
        return cls(
            items,
            config,
            policy,
            floor_pages,
            rows,
            rank.state.state_slots(rows),
            to_device([item.covered for item in items], torch.int32, device),
            to_device(starts[:-1], torch.int64, device),
            list(pairwise(starts)),
            sinks,
            [
                min(
                    shielded - sinks,
                    budget.num_recent(config.recent, item.num_tokens, item.covered, size),
                )
                for item in items
            ],
        )

    def part(self, which: list[int]) -> Batch[Item]:
        """Some of its requests, whose candidates stay where they are."""
        if len(which) == len(self.items):
            return self
        index = to_device(which, torch.int64, self.rows.device)
        return replace(
            self,
            items=[self.items[i] for i in which],
            rows=self.rows[index],
            state_slot=self.state_slot[index],
            covered=self.covered[index],
            unit_start=self.unit_start[index],
            recent=[self.recent[i] for i in which],
            spans=[self.spans[i] for i in which],
        )

    @property
    def num_units(self) -> int:
        """Candidate units of the batch."""
        return self.spans[-1][1]


def batches(due: Sequence[Judged], rank: Rank, longest: int = 0) -> Iterator[list[Judged]]:
    """Runs of requests with at most :data:`MOST_TOKENS` candidate keys per head, or as many as the
    longest request may have, for whom memory is set aside anyway.

    Args:
        longest: tokens of that one.
    """
    most = max(MOST_TOKENS, longest)
    batch: list[Judged] = []
    keys = 0
    for item in due:
        more = rank.candidate_units(item) * rank.group.block_size
        if batch and keys + more > most:
            yield batch
            batch, keys = [], 0
        batch.append(item)
        keys += more
    if batch:
        yield batch


def padded_rows(blocks: list[list[int]], device: torch.device) -> Tensor:
    """``[R, M]`` int32, ragged rows padded with the null block."""
    width = max(map(len, blocks))
    padded = [row + [0] * (width - len(row)) for row in blocks]
    return to_device(padded, torch.int32, device)


def _starts(counts: Iterable[int]) -> list[int]:
    """Exclusive prefix sums, and the total last."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
