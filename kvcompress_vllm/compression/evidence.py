# SPDX-License-Identifier: Apache-2.0
"""What a policy may look at, as one rectangle per request. Letters as in ``cache/layout.py``.

Heads that were packed before differ in length, and how long each is only the device knows. Policies
see all of them as wide as the longest; shorter ones end with it, so that the latest keys are in
line::

    candidates, one head after the other   a a a a a t t   b b t t   c c c t t
    place                                  a a a a a t t
                                           . . . b b t t      t: full blocks of the tail
                                           . . c c c t t      .: absent
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout
from kvcompress_vllm.compression import gather
from kvcompress_vllm.compression.batch import Batch, Rank
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.records.plan import Judged


class Rectangle(NamedTuple):
    """Where the candidate pages of a request lie in what its policy sees."""

    width: int
    """Units of B keys of every head."""
    units: int
    """Candidate units of the request, those of draft layers left out."""
    lengths: Tensor | None = None
    """``[L, H]`` int32, candidate units of each head; None: all heads are as long as it is wide."""
    place: Tensor | None = None
    """``[L * H * width]`` int64, the candidate unit that is seen there; ``units``: none."""
    absent: Tensor | None = None
    """``[L * H, width]`` bool, places without one."""

    @classmethod
    def of(cls, rank: Rank, item: Judged, width: int) -> Rectangle:
        """Args: width: units of the longest head, or more."""
        group = rank.group
        layers, heads, m = group.target_layers, group.target_heads, group.blocks_per_page
        units = rank.candidate_units(item) * heads
        if not item.old_kept:
            return cls(width, units)
        state, device = rank.state, rank.pages.device
        fresh = item.covered - item.old_covered
        lengths = state.num_pages[item.packed_slot, :layers] * m + fresh
        first = layout.first_candidate(
            state.first_page[item.packed_slot, :layers].view(heads, 1),
            torch.arange(heads, device=device).unsqueeze(1),
            fresh,
            m,
        )
        j = torch.arange(width, device=device) - width + lengths.view(heads, 1)
        place = torch.where(j >= 0, first + j, units).flatten().long()
        return cls(width, units, lengths, place, j < 0)

    def spread(self, statistics: Tensor) -> Tensor:
        """``[channels, L * H * width, B]`` of ``[channels, units, B]``; 0 where there is none."""
        if self.place is None or self.absent is None:
            return statistics
        spread = statistics[:, self.place.clamp(max=self.units - 1)]
        return spread.masked_fill_(self.absent.view(1, -1, 1), 0)

    def gathered(self, scores: Tensor) -> Tensor:
        """``[units, B]`` of ``[L * H * width, B]``."""
        if self.place is None:
            return scores
        result = scores.new_empty((self.units + 1, scores.shape[1]))
        result[self.place] = scores
        return result[: self.units]


def evidence_of(
    rank: Rank,
    batch: Batch[Judged],
    index: int,
    rectangle: Rectangle,
    statistics: Tensor,
    counts: Tensor | None,
) -> Evidence:
    """What is known of one request of a batch.

    Args:
        statistics: ``[channels, units, B]`` of this request; heads may differ in length. Of draft
            layers there are none.
        counts: ``[units, B]`` queries that saw each key, or None.
    """
    item, config, state = batch.items[index], batch.config, rank.state
    group = rank.group
    heads, block_size = group.target_heads, group.block_size
    left_out = (item.covered - rectangle.width) * block_size
    window = min(config.window, item.num_tokens)
    absent = rectangle.absent
    if counts is not None:
        statistics = torch.cat([statistics, counts[None]])
    statistics = rectangle.spread(statistics)
    keys, values, queries = gather.readers(
        rank.pages,
        batch.rows[index],
        item.num_tokens,
        state,
        item.observe_slot,
        window,
        gather.Packed(item.packed_slot, item.old_covered) if item.old_kept else None,
        left_out,
    )
    by_channel = [part.reshape(heads, -1) for part in statistics]
    return Evidence(
        layers=group.target_layers,
        heads=group.heads,
        group=group.queries_per_head,
        num_keys=rectangle.width * block_size,
        num_kept=item.kept * group.page_keys,
        seq_len=item.num_tokens - left_out,
        num_queries=item.observed.before + item.observed.num_queries if item.observed else window,
        num_sinks=batch.sinks,
        num_recent=batch.recent[index],
        scale=group.scale,
        device=rank.pages.device,
        statistics=dict(zip(sorted(batch.policy.channels), by_channel, strict=counts is None)),
        counts=None if counts is None else by_channel[-1],
        density=rank.candidate_units(item) / item.covered,
        absent=None if absent is None else absent.repeat_interleave(block_size, 1),
        replayed=item.replayed,
        keys=keys,
        values=values,
        queries=queries,
    )
