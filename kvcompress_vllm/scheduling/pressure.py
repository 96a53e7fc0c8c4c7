# SPDX-License-Identifier: Apache-2.0
"""Who is compressed early when the pool runs short: those that lose least per block."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.request import Tracked

LEAST_GAIN = 2
"""Blocks that an early compression must give back to be worth its while."""

LOSS_DIGITS = 4
"""Decimals of the loss per block that count; among equals, who gives back most comes first."""


class Early(NamedTuple):
    """A compression before its time."""

    gain: int
    """Blocks that it gives back."""
    due_at: int
    ratio: float | None
    """It compresses at least so much; None: the usual budget."""
    tracked: Tracked


def early(
    requests: Collection[Tracked],
    num_computed: Mapping[str, int],
    num_free: int,
    limits: Limits,
    window: int,
    drafts: int,
    max_ratio: float | None,
    most: int,
) -> list[Early]:
    """Early compressions that give back what will be missing: at the usual budgets, and where that
    is not enough at ``max_ratio``.

    Args:
        num_computed: computed tokens of the running requests.
        num_free: free blocks of the pool.
        window: tokens for which each is observed first.
        drafts: tokens beyond those that a step may compute, some to be rejected.
        most: how many there may be.
    """
    block_size = limits.block_size
    grown = window + drafts
    growth = len(num_computed) * ((grown + block_size) // block_size)
    if num_free >= growth + (limits.max_tokens + grown) // block_size:
        return []  # more than what is missing can come to
    missing = _missing(requests, num_computed, num_free, grown, block_size)
    chosen: dict[str, Early] = {}
    for ratio in [None] if max_ratio is None else [None, max_ratio]:
        idle = [
            tracked
            for tracked in requests
            if tracked.observe_slot is None and tracked.request_id not in chosen
        ]
        for item in _ordered(idle, num_computed, window, block_size, ratio):
            if missing <= 0 or len(chosen) >= most:
                return list(chosen.values())
            chosen[item.tracked.request_id] = item
            missing -= item.gain
    return list(chosen.values())


def _missing(
    requests: Iterable[Tracked],
    num_computed: Mapping[str, int],
    num_free: int,
    grown: int,
    block_size: int,
) -> int:
    """Blocks that will be missing before a compression that is prepared now is carried out.

    By then the running requests have grown by ``grown`` tokens; the largest copy must fit; and
    what is under way gives blocks back.
    """
    growth = sum((n + grown) // block_size - (n - 1) // block_size for n in num_computed.values())
    copy = given_back = 0
    for tracked in requests:
        later = num_computed.get(tracked.request_id, 0) + grown
        copy = max(copy, tracked.packed(later).kept)
        if tracked.observe_slot is not None:
            target = tracked.target()
            copy = max(copy, target.kept)
            given_back += tracked.gives_back(target)
    return growth + copy - given_back - num_free


def _ordered(
    idle: Iterable[Tracked],
    num_computed: Mapping[str, int],
    window: int,
    block_size: int,
    ratio: float | None,
) -> list[Early]:
    """Early compressions that are worth it, in the order in which to take them.

    By loss only among gains of one magnitude: a slot is taken for a whole window, so one that is
    spent on a small gain leaves the pool short, and a preemption loses most.
    """
    worth = [
        Early(gain, due_at, ratio, tracked)
        for tracked in idle
        if (due_at := num_computed.get(tracked.request_id, 0) + window) > window
        and (gain := tracked.gain(due_at, ratio)) >= LEAST_GAIN
    ]
    best = max((item.gain for item in worth), default=0)

    def order(item: Early) -> tuple[int, float, int]:
        covered = item.tracked.sizes.covered(item.due_at)
        loss = _loss_per_block(item.tracked, covered, item.gain)
        return (best // item.gain).bit_length(), loss, -item.gain

    return sorted(worth, key=order)


def _loss_per_block(tracked: Tracked, covered: int, gain: int) -> float:
    """Share of its score mass that a request would lose per block given back.

    Read off the curve of its latest compression, as if what it decoded since were worth as much as
    what it kept then. A request that was never compressed has no curve and has lost nothing: its
    cheapest blocks are taken to be free. One whose curve is still on its way comes last.

    Args:
        covered: F of the compression.
        gain: blocks that it gives back.
    """
    if tracked.curve is None:
        return math.inf if tracked.kept else 0.0
    left = tracked.packing.candidates(covered) - gain
    kept = tracked.kept * min(
        1, left / tracked.packing.all_kept(covered, tracked.sizes.blocks_per_page)
    )
    lost = tracked.curve.lost_at(kept) - tracked.curve.lost_at(tracked.kept)
    return round(lost / gain, LOSS_DIGITS)
