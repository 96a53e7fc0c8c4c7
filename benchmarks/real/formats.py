# SPDX-License-Identifier: Apache-2.0
"""How packed pages store keys and values, as what is left of them: by the rules of the engine and
without its code.

A page has as many bytes whatever its dtype, so fewer bits are more keys. Only what a compression
packs is quantised; the keys after the last whole page stay as they are. Ranges are those of the
keys that are kept. Shapes: ``vectors`` ``[..., P, D]``, ``kept`` ``[..., P]`` bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Quantise = Callable[[Tensor, Tensor], Tensor]
"""Of vectors, and which of them are there: the same after a round trip."""

AUTO = "auto"
SMALLEST = 1e-6


class Format(NamedTuple):
    """A page dtype: keys in the bytes of one key of 16 bits, and both round trips."""

    packing: float
    keys: Quantise
    values: Quantise


def plain(vectors: Tensor, kept: Tensor) -> Tensor:
    """16 bits: as they are."""
    return vectors


def fp8(vectors: Tensor, kept: Tensor) -> Tensor:
    """E4M3 with one scale per head."""
    scale = (vectors.abs() * kept[..., None]).amax((-2, -1), keepdim=True).clamp(min=SMALLEST) / 448
    # What is not there may be larger, and E4M3 has no infinity: it would be no number, times zero.
    steps = (vectors / scale).clamp(-448, 448)
    return steps.to(torch.float8_e4m3fn).to(vectors.dtype) * scale


def ranges(vectors: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, lowest and highest of the keys that are there: ``[..., 1, D]`` each."""
    there = kept[..., None]
    low = vectors.masked_fill(~there, torch.inf).amin(-2, keepdim=True)
    high = vectors.masked_fill(~there, -torch.inf).amax(-2, keepdim=True)
    nothing = ~there.any(-2, keepdim=True)
    return low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)


def on_grid(vectors: Tensor, low: Tensor, high: Tensor, levels: int = 15) -> Tensor:
    """The nearest of ``levels + 1`` values from ``low`` to ``high``."""
    step = (high - low).clamp(min=SMALLEST) / levels
    return ((vectors - low) / step).round().clamp(0, levels) * step + low


def by_channel(vectors: Tensor, kept: Tensor) -> Tensor:
    """4 bits, a scale and a zero point per channel over the request."""
    return on_grid(vectors, *ranges(vectors, kept))


def clipped(*shares: float, even: bool = False) -> Quantise:
    """As ``by_channel``, of a range as much narrower as leaves the least squared error.

    Args:
        shares: of half of the range, around its middle, that are tried.
        even: take errors inside the range to be spread evenly over a step, as the product does.
    """

    def quantise(vectors: Tensor, kept: Tensor) -> Tensor:
        low, high = ranges(vectors, kept)
        middle, half = (low + high) / 2, (high - low) / 2
        best = least = None
        for share in shares:
            start, end = middle - share * half, middle + share * half
            found = on_grid(vectors, start, end)
            error = (found - vectors).square()
            if even:
                outside = torch.maximum(start - vectors, vectors - end).clamp(min=0)
                error = outside.square() + ((end - start) / 15).square() / 12
            error = (error * kept[..., None]).sum(-2, keepdim=True)
            if best is None or least is None:
                best, least = found, error
            else:
                best, least = torch.where(error < least, found, best), torch.minimum(error, least)
        assert best is not None
        return best

    return quantise


SHARES = 1, 0.9, 0.8, 0.7, 0.6, 0.5
SIX = clipped(*SHARES)
EVEN = clipped(1, 0.75, 0.5, even=True)


def by_token(vectors: Tensor, kept: Tensor) -> Tensor:
    """4 bits, a scale and a zero point per key: as KIVI (arXiv 2402.02750) has values."""
    return on_grid(vectors, vectors.amin(-1, keepdim=True), vectors.amax(-1, keepdim=True))


def grid_by_token(bits: int, groups: int = 1) -> Quantise:
    """A scale and a zero point per key and group of channels."""

    def quantise(vectors: Tensor, kept: Tensor) -> Tensor:
        parts = vectors.unflatten(-1, (groups, -1))
        low, high = parts.amin(-1, keepdim=True), parts.amax(-1, keepdim=True)
        return on_grid(parts, low, high, 2**bits - 1).flatten(-2)

    return quantise


def centred(inner: Quantise) -> Quantise:
    """Around the mean of each channel: what all keys share is exact."""

    def quantise(vectors: Tensor, kept: Tensor) -> Tensor:
        there = kept[..., None]
        total = there.sum(-2, keepdim=True).clamp(min=1)
        mean = (vectors * there).sum(-2, keepdim=True) / total
        return inner(vectors - mean, kept) + mean

    return quantise


def symmetric_by_token(vectors: Tensor, kept: Tensor) -> Tensor:
    """4 bits, a scale per key."""
    most = vectors.abs().amax(-1, keepdim=True)
    return on_grid(vectors, -most, most * 7 / 8, 15)


def hadamard(size: int, device: torch.device) -> Tensor:
    """``[size, size]`` orthogonal and symmetric; size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def rotated(inner: Quantise) -> Quantise:
    """Quantised after a Hadamard rotation of the channels, as QuaRot (arXiv 2404.00456)."""

    def quantise(vectors: Tensor, kept: Tensor) -> Tensor:
        turn = hadamard(vectors.shape[-1], vectors.device).to(vectors.dtype)
        return inner(vectors @ turn, kept) @ turn

    return quantise


PRODUCT = rotated(clipped(1, 0.875, 0.75, 0.5, even=True))


def by_run(keys: int, inner: Quantise) -> Quantise:
    """Quantised run by run of so many kept keys, each with scales of its own."""

    def quantise(vectors: Tensor, kept: Tensor) -> Tensor:
        place = kept.cumsum(-1) - kept.long()
        result = vectors.clone()
        for first in range(0, int(place.max()) + 1, keys):
            mine = kept & (place >= first) & (place < first + keys)
            result = torch.where(mine[..., None], inner(vectors, mine), result)
        return result

    return quantise


def without_sinks(inner: Quantise, sinks: int = 4) -> Quantise:
    """The first keys as they are, and of no influence on the others."""

    def quantise(vectors: Tensor, kept: Tensor) -> Tensor:
        others = kept.clone()
        others[..., :sinks] = False
        result = inner(vectors, others)
        return torch.cat([vectors[..., :sinks, :], result[..., sinks:, :]], -2)

    return quantise


FORMATS: dict[str, Format] = {
    AUTO: Format(1, plain, plain),
    "fp8": Format(2, fp8, fp8),
    "int4": Format(4, PRODUCT, PRODUCT),
    "int4_three_cuts": Format(4, rotated(EVEN), rotated(EVEN)),
    "int4_six_cuts": Format(4, rotated(SIX), rotated(SIX)),
    "int4_keys_rotated": Format(4, PRODUCT, EVEN),
    "int4_unrotated": Format(4, EVEN, EVEN),
    "int4_unrotated_six_cuts": Format(4, SIX, SIX),
    "int4_unrotated_range": Format(4, by_channel, by_channel),
    "int4_unrotated_no_sinks": Format(4, without_sinks(SIX), without_sinks(SIX)),
    "int4_token": Format(4, centred(rotated(by_token)), centred(rotated(by_token))),
    "int4_token_symmetric": Format(
        4, centred(rotated(symmetric_by_token)), centred(rotated(symmetric_by_token))
    ),
    "int4_token_unrotated": Format(4, centred(by_token), centred(by_token)),
    "int4_token_groups": Format(3.5, centred(grid_by_token(4, 2)), grid_by_token(4, 2)),
    "int4_page": Format(3.5, by_run(56, by_channel), by_token),
    "k5v3": Format(4, centred(rotated(grid_by_token(5))), centred(rotated(grid_by_token(3)))),
    "k5v4": Format(3, centred(rotated(grid_by_token(5))), by_token),
    "k6v4": Format(2.75, centred(grid_by_token(6)), by_token),
    "k8v4": Format(2.5, centred(grid_by_token(8)), by_token),
    "exact3.5": Format(3.5, plain, plain),
    "exact4": Format(4, plain, plain),
}
"""``int4`` is the product's. Those of fewer keys to a page have scales by key or page within it;
``int4_token`` would have them beside it. The last two say what dropping keys alone costs."""
