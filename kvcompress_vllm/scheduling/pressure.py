# SPDX-License-Identifier: Apache-2.0
"""Who is compressed early when the pool runs short: those that lose least per block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

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
    tracked: Tracked


def may_be_short(
    num_computed: Mapping[str, int], num_free: int, window: int, block_size: int, max_tokens: int
) -> bool:
    """Whether ``missing`` can be positive at all; quick."""
    growth = len(num_computed) * ((window + block_size) // block_size)
    return num_free < growth + (max_tokens + window) // block_size


def missing(
    requests: Iterable[Tracked],
    num_computed: Mapping[str, int],
    num_free: int,
    window: int,
    block_size: int,
) -> int:
    """Blocks that will be missing before a compression that is prepared now is carried out.

    By then the running requests have grown by ``window`` tokens; the largest copy must fit; and
    what is under way gives blocks back.
    """
    growth = sum((n + window) // block_size - (n - 1) // block_size for n in num_computed.values())
    copy = given_back = 0
    for tracked in requests:
        later = num_computed.get(tracked.request_id, 0) + window
        copy = max(copy, tracked.sizes.packed(later).kept)
        if tracked.observe_slot is not None:
            target = tracked.target()
            copy = max(copy, target.kept)
            given_back += tracked.packing.gives_back(target)
    return growth + copy - given_back - num_free


def choose(
    requests: Iterable[Tracked],
    num_computed: Mapping[str, int],
    window: int,
    block_size: int,
    ratio: float | None,
) -> Iterator[Early]:
    """Early compressions that are worth it, in the order in which to take them.

    By loss only among gains of one magnitude: a slot is taken for a whole window, so one that is
    spent on a small gain leaves the pool short, and a preemption loses most.

    Args:
        window: tokens for which each is observed first.
        ratio: compress at least so much; None: the usual budget.
    """
    early = [
        Early(tracked.gain(due_at, ratio), due_at, tracked)
        for tracked in requests
        if tracked.observe_slot is None
        and (due_at := num_computed.get(tracked.request_id, 0) + window) > window
    ]
    early = [item for item in early if item.gain >= LEAST_GAIN]
    best = max((item.gain for item in early), default=0)

    def order(item: Early) -> tuple[int, float, int]:
        loss = _loss_per_block(item.tracked, item.due_at // block_size, item.gain)
        return (best // item.gain).bit_length(), loss, -item.gain

    return iter(sorted(early, key=order))


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
    held = tracked.packing.candidates(covered)
    kept = tracked.kept * (held - gain) / held
    lost = tracked.curve.lost_at(kept) - tracked.curve.lost_at(tracked.kept)
    return round(lost / gain, LOSS_DIGITS)
