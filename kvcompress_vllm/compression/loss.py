# SPDX-License-Identifier: Apache-2.0
"""What fewer blocks would cost: scores per page, and the loss curve of a request.

A policy's score says how much a key is worth, so the sum over a set of keys is their **mass**. Keys
that a shield keeps anyway have none. Scores of some policies are negative; then a key's mass is its
score less the lowest of its request, so that no mass is negative.

The **loss curve** (``records/curve.py``) says which share of the mass is lost at each number of
blocks C that the request could keep: pages are dropped as the selection op drops them, cheapest
first among the heads that compete, down to the floor. Letters as in ``cache/layout.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

POINTS = 64
"""Block counts at which a curve is known, at most."""

KEYS_AT_ONCE = 1 << 20
"""Keys that are sorted at once; bounds the memory."""


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
    scores: Tensor, shielded: Tensor, page_keys: int, worth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cost and mass of every page that a head could lose, in the order in which it would.

    Args:
        scores: ``[S, n]`` fp32; infinite ones count as shielded.
        shielded: ``[S, n]`` or ``[1, n]`` bool: keys that stay whatever their score, or absent.
        page_keys: T, keys that a packed page holds; divides n.
        worth: ``[S, n]`` fp32 >= 0, what masses are sums of; None: of the scores.

    Returns:
        ``[S, n / T]`` fp32 costs as of ``ops.select_pages``, inf where a page has shielded keys;
        ``[S, n / T]`` fp64 masses.
    """
    costs, sums, counts, lowest = [], [], [], []
    rows = max(1, KEYS_AT_ONCE // scores.shape[1])
    hidden = shielded.expand_as(scores).split(rows)
    counted = (scores if worth is None else worth).split(rows)
    for part, mask, values in zip(scores.split(rows), hidden, counted, strict=True):
        ordered, order = part.masked_fill(mask, torch.inf).sort(-1)
        in_order = ordered if worth is None else values.gather(-1, order)
        pages = ordered.unflatten(-1, (-1, page_keys))
        open_ = pages < torch.inf
        values = in_order.view_as(pages).masked_fill(~open_, 0)
        costs.append(pages[..., -1])
        sums.append(values.sum(-1, dtype=torch.float64))  # scores may be near the largest fp32
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
