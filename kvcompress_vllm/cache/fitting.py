# SPDX-License-Identifier: Apache-2.0
"""Scales that fit what packed pages hold. Letters and formats as in ``page_format.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvcompress_vllm.cache.page_format import (
    FP8_MAX,
    INT4_HIGH,
    INT4_LOW,
    SCALE_DTYPE,
    PageFormat,
    inverse,
)

CUTS = (0.0, 0.0625, 0.125, 0.25)
"""Shares of a channel's range that int4 may cut off on either side. Powers of two, so that every
kernel finds the same scales."""
JUDGED = 1024
"""At least as many keys, of those there are, tell which share is best."""
REACHED = (1.0, 0.0, 0.25, 0.5)
"""Shares of what lies beyond the codes that int4 may reach for when it goes on; 0 moves nothing."""
FARTHEST = 64.0
"""Steps beyond the codes; reaching for less than everything may leave no number farther off."""
MOST_PARTS = 256
"""Of steps, of which squares are summed up: a kernel in fp32 does that without rounding."""


def fit(values: Tensor, page_format: int) -> Tensor:
    """Scales for numbers, as :func:`.page_format.to_stored` has them.

    Of int4, each channel takes the share of its range around the middle with which the squared
    errors sum up to least: numbers outside become the nearest code. Standard deviations would not
    do: they cut off the few large keys that attention needs. Of more than twice ``JUDGED`` keys
    every n-th is looked at for that.

    Args:
        values: ``[n, 2 * D]`` fp32, K then V, n > 0.

    Returns:
        ``[A, S]``.
    """
    low, high = values.amin(0), values.amax(0)
    if page_format == PageFormat.FP8:
        return _round_up(_largest(low, high) / FP8_MAX)[None]
    cuts = [(high - low) * cut for cut in CUTS]
    ranges = [_around(low + cut, high - cut) for cut in cuts]
    judged = _judged(values)
    return _best(ranges, [len(judged)] * len(CUTS), judged, 16)


def widen(scales: Tensor, values: Tensor, kept: int, page_format: int) -> Tensor:
    """Scales of numbers quantised before, for new ones as well.

    Of int4, each channel takes the range with which the squared errors sum up to least, of new
    numbers and of what moving to new codes costs each that was kept::

        codes reach       |----------------|
        new numbers            x   x x  x       x   x      x
        share 0           |----------------|                    nothing moves
        1/4, 1/2          |--------------------| ...
        1                 |--------------------------------|    nothing is left out

    So a channel moves rarely, however often a request is compressed, and for one key in many only
    if that lies far off, at the latest at more than ``FARTHEST`` steps.

    Args:
        scales: ``[A, S]`` of what there is.
        values: ``[n, 2 * D]`` fp32, the new numbers as ``to_stored`` has them, n > 0.
        kept: how many keys there are with these scales.

    Returns:
        ``[A, S]``.
    """
    low, high = values.amin(0), values.amax(0)
    scale = scales[0].float()
    if page_format == PageFormat.FP8:
        largest = _largest(low, high)
        fresh = _round_up(largest / FP8_MAX)
        # Half a step beyond the largest code.
        doubled = _doubled(scale, lambda scale: largest > 464 * scale)
        return torch.where(scale > 0, doubled, fresh)[None]
    least, greatest = _reach(scales)
    judged = _judged(values)
    ranges: list[Tensor] = []
    counts: list[int] = []
    for share in REACHED:
        below = least - (least - low).clamp(min=0) * share
        above = greatest + (high - greatest).clamp(min=0) * share
        found = _around(below, above) if share else scales
        # As many of those kept as are looked at of the new ones.
        counts.append(len(judged) + (kept * len(judged) // len(values) if share else 0))
        if ranges:
            first, last = _reach(found)
            far = torch.maximum(first - low, high - last) > FARTHEST * found[0].float()
            found = torch.where(far, ranges[0], found)
        ranges.append(found)
    return _best(ranges, counts, judged, MOST_PARTS // int(FARTHEST))


def _judged(values: Tensor) -> Tensor:
    """The keys that tell which range is best."""
    return values[:: max(1, len(values) // JUDGED)]


def _around(below: Tensor, above: Tensor) -> Tensor:
    """``[2, S]``: scale and zero of int4 whose codes reach a range."""
    # Half a step above the middle. No product here is rounded, so that none can be fused.
    zero = ((above + below) * 0.5 + (above - below) / 30).to(SCALE_DTYPE)
    return torch.stack([_reaching(below, above, zero.float()), zero])


def _reach(scales: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest number that codes of int4 stand for."""
    scale, zero = scales.float()
    return zero + INT4_LOW * scale, zero + INT4_HIGH * scale


def _best(ranges: list[Tensor], counts: list[int], judged: Tensor, parts: int) -> Tensor:
    """``[2, S]``: of each channel the range with the least squared error, the first of equal ones.

    Args:
        ranges: scales and zeros; the first leaves no number out.
        counts: of the numbers that each has an error of: inside, errors spread evenly over a step.
        judged: ``[n, S]``, numbers that may lie outside; that is counted in parts of a step.
        parts: of a step.
    """
    errors = []
    for index, (found, count) in enumerate(zip(ranges, counts, strict=True)):
        scale = found[0].float()
        least, greatest = _reach(found)
        outside = torch.maximum(judged - greatest, least - judged).clamp(min=0)
        steps = (outside * (inverse(scale) * parts)).round()
        squares = steps.clamp(max=MOST_PARTS).long().square().sum(0) if index else 0
        inside = torch.full_like(scale, count * parts**2, dtype=torch.float64) / 12
        errors.append((inside + squares) * scale.double().square())
    best = torch.stack(errors).argmin(0)
    return torch.stack(ranges).gather(0, best.expand(1, 2, -1))[0]


def _largest(low: Tensor, high: Tensor) -> Tensor:
    """``[2]``: greatest absolute value of K and of V."""
    return torch.maximum(low.abs(), high.abs()).view(2, -1).amax(-1)


def _reaching(low: Tensor, high: Tensor, zero: Tensor) -> Tensor:
    """The least scale with which 4-bit codes reach a range around ``zero``."""
    return _round_up(torch.maximum((high - zero) / INT4_HIGH, (zero - low) / -INT4_LOW))


def _round_up(x: Tensor) -> Tensor:
    """To bfloat16, no less than ``x``, which is not negative."""
    return (x.contiguous().view(torch.int32) + 0xFFFF >> 16).to(torch.int16).view(SCALE_DTYPE)


def _doubled(scale: Tensor, short: Callable[[Tensor], Tensor]) -> Tensor:
    """Scales doubled until they are no longer ``short``; what is 0 stays."""
    while bool((grows := short(scale) & (scale > 0)).any()):
        scale = torch.where(grows, 2 * scale, scale)
    return scale.to(SCALE_DTYPE)
