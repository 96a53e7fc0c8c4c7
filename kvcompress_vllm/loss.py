# SPDX-License-Identifier: Apache-2.0
"""What fewer blocks would cost: scores per page, and the loss curve of a request.

A policy's score says how much a key is worth, so the sum over a set of keys is their **mass**. Keys
that a shield keeps anyway have none. Scores of some policies are negative; then a key's mass is its
score less the lowest of its request, so that no mass is negative.

The **loss curve** says which share of the mass is lost at each number of blocks C that the request
could keep: pages are dropped as the selection op drops them, cheapest first among the heads that
compete, down to the floor. Letters as in ``kvcompress_vllm/layout.py``.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

POINTS = 64
"""Block counts at which a curve is known, at most."""

KEYS_AT_ONCE = 1 << 20
"""Keys that are sorted at once; bounds the memory."""


class LossCurve(NamedTuple):
    """Share of the score mass lost at some block counts; between them, on the straight line.

    The cheapest pages go first, so the true loss lies below that line (with ``layer`` and
    ``uniform`` allocation and shares that move with C, nearly so).
    """

    blocks: list[int]
    """C, ascending, from the floor to all candidates."""
    lost: list[float]
    """In ``[0, 1]``, never rising; 0 at last."""

    def lost_at(self, blocks: float) -> float:
        """Share of the mass lost when ``blocks`` blocks stay; below the floor, as at the floor."""
        if blocks <= self.blocks[0]:
            return self.lost[0]
        if blocks >= self.blocks[-1]:
            return self.lost[-1]
        above = bisect_left(self.blocks, blocks)
        low, high = self.blocks[above - 1], self.blocks[above]
        part = (high - blocks) / (high - low)
        return self.lost[above] + part * (self.lost[above - 1] - self.lost[above])

    def fewest_blocks(self, mass: float) -> int:
        """The fewest blocks that keep the share ``mass``, on the curve's lines."""
        allowed = max(1 - mass + 1e-9, self.lost[-1])  # 1 - 0.9 is not quite 0.1
        index = next(i for i, lost in enumerate(self.lost) if lost <= allowed)
        if index == 0:
            return self.blocks[0]
        steep = self.lost[index - 1] - self.lost[index]
        part = (allowed - self.lost[index]) / steep
        gap = self.blocks[index] - self.blocks[index - 1]
        return self.blocks[index] - max(0, min(gap - 1, int(part * gap)))


def curve_points(candidates: int, floor: int, kept: int) -> list[int]:
    """Block counts of a curve, ascending: all of them, or spaced by an equal factor.

    Args:
        candidates: blocks that compete.
        floor: fewest that can stay.
        kept: C of the compression; is among them.
    """
    if candidates - floor < POINTS:
        return list(range(floor, candidates + 1))
    factor = (candidates / floor) ** (1 / (POINTS - 2))
    spaced = {min(candidates, round(floor * factor**i)) for i in range(POINTS - 1)}
    return sorted(spaced | {floor, kept, candidates})


def page_masses(
    scores: Tensor, shielded: Tensor, block_size: int, worth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cost and mass of every page that a head could lose, in the order in which it would.

    Args:
        scores: ``[S, n]`` fp32; infinite ones count as shielded.
        shielded: ``[S, n]`` or ``[1, n]`` bool: keys that stay whatever their score, or absent.
        block_size: B, divides n.
        worth: ``[S, n]`` fp32 >= 0, what masses are sums of; None: of the scores.

    Returns:
        ``[S, n / B]`` fp32 costs as of ``ops.select_pages``, inf where a page has shielded keys;
        ``[S, n / B]`` fp64 masses.
    """
    costs, sums, counts, lowest = [], [], [], []
    rows = max(1, KEYS_AT_ONCE // scores.shape[1])
    hidden = shielded.expand_as(scores).split(rows)
    counted = (scores if worth is None else worth).split(rows)
    for part, mask, values in zip(scores.split(rows), hidden, counted, strict=True):
        ordered, order = part.masked_fill(mask, torch.inf).sort(-1)
        in_order = ordered if worth is None else values.gather(-1, order)
        pages = ordered.unflatten(-1, (-1, block_size))
        open_ = pages < torch.inf
        values = in_order.view_as(pages).masked_fill(~open_, 0)
        costs.append(pages[..., -1])
        sums.append(values.sum(-1).double())
        counts.append(open_.sum(-1))
        lowest.append(values[:, 0, 0].amin())
    least = torch.stack(lowest).amin().clamp(max=0).double()
    return torch.cat(costs), torch.cat(sums) - least * torch.cat(counts)


def loss_at(
    costs: Tensor, masses: Tensor, lengths: Tensor | int, floor_pages: int, freed: Tensor
) -> Tensor:
    """Share of the mass that is lost with the cheapest pages of every group of heads.

    Args:
        costs, masses: from :func:`page_masses`.
        lengths: ``[S]`` int, pages of each head; an int: of all.
        floor_pages: pages that every head keeps.
        freed: ``[P, A]`` int, pages freed per group as of ``ops.select_pages``, P times.

    Returns:
        ``[P]`` fp64 in ``[0, 1]``; 0 where there is no mass at all.
    """
    page = torch.arange(costs.shape[1], device=costs.device)
    most = lengths - floor_pages
    if isinstance(most, Tensor):
        most = most.unsqueeze(-1)
    groups = freed.shape[1]
    costs = costs.masked_fill(page >= most, torch.inf).view(groups, -1)
    # Ties go to the first head, as in the selection.
    order = costs.sort(dim=-1, stable=True).indices
    lost = masses.view(groups, -1).gather(-1, order).cumsum(-1)
    lost = torch.cat([lost.new_zeros(groups, 1), lost], dim=-1)
    per_group = lost.gather(-1, freed.T.long())
    total = masses.sum()
    return torch.where(total > 0, per_group.sum(0) / total, 0.0).clamp(0, 1)


def scratch_bytes(num_keys: int) -> int:
    """Memory that a curve over ``num_keys`` candidate keys of all heads takes while it is made."""
    # A copy, sorted values and their indices, and as much again for the sort. Pages are few. What
    # keys are worth in the order of their scores takes the place of the sort's own memory.
    return 32 * min(num_keys, KEYS_AT_ONCE) + 4 * num_keys
