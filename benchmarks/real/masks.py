# SPDX-License-Identifier: Apache-2.0
"""Which keys stay, by the rules of the engine and without its code.

Whole pages are freed per head: the keys of a head are sorted, freeing e pages costs the score at
rank ``e * page - 1``, and the cheapest pages of all competing heads go. What no page holds in full
at the end stays. A page of 1 key is the usual selection key by key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ALLOCATORS = ("global", "layer", "uniform")


@dataclass(frozen=True)
class Shields:
    """What is kept whatever the scores say. Lengths in tokens."""

    page: int = 16
    """Keys that a head frees together."""
    sinks: int = 4
    recent: int = 32
    floor: int = 16
    """Of every head, shields included, rounded up to pages."""
    min_budget: int = 0
    """That a head keeps on average at least."""


@dataclass(frozen=True)
class Counts:
    """The budget of a context of P tokens."""

    candidates: int
    recent: int
    floor: int
    """Pages that every head keeps."""
    kept: int
    """Pages that a head keeps on average."""
    page: int

    @property
    def blocks(self) -> int:
        """Pages that a head has."""
        return self.candidates // self.page


def count(length: int, ratio: float, shields: Shields) -> Counts:
    """What ``ratio`` leaves of ``length`` tokens."""
    page = shields.page
    blocks = length // page
    candidates = blocks * page
    recent = min(candidates, max(0, shields.recent - (length - candidates)))
    floor = math.ceil(max(shields.sinks + recent, shields.floor) / page)
    kept = max(floor, math.ceil(shields.min_budget / page), math.ceil(blocks / ratio))
    return Counts(candidates, recent, min(floor, blocks), min(kept, blocks), page)


def open_keys(length: int, shields: Shields, device: torch.device) -> Tensor:
    """``[length]`` bool: candidates that no shield covers."""
    counts = count(length, 1, shields)
    place = torch.arange(length, device=device)
    return (place >= shields.sinks) & (place < counts.candidates - counts.recent)


def keep(
    scores: Tensor,
    ratio: float,
    shields: Shields,
    allocator: str = "global",
    present: Tensor | None = None,
) -> Tensor:
    """Choose the keys to keep.

    Args:
        scores: ``[N, L, H, P]``; higher means keep.
        ratio: candidate pages / kept pages.
        allocator: which heads compete, one of :data:`ALLOCATORS`.
        present: ``[N, L, H, P]`` bool, keys that earlier rounds left; None: all.

    Returns:
        ``[N, L, H, P]`` bool.
    """
    n, layers, heads, length = scores.shape
    counts = count(length, ratio, shields)
    candidates, page = counts.candidates, counts.page
    shielded = ~open_keys(length, shields, scores.device)[:candidates]
    scores = scores[..., :candidates].float().masked_fill(shielded, torch.inf)
    if present is not None:
        # Pages of earlier rounds cost nothing more: they go first again.
        scores = scores.masked_fill(~present[..., :candidates], -torch.inf)
    ascending, order = scores.flatten(1, 2).sort(stable=True)
    evictable = (counts.blocks - counts.floor) * page
    cost = ascending[..., page - 1 : evictable : page]  # [N, L * H, pages]
    groups = {"global": 1, "layer": layers, "uniform": layers * heads}[allocator]
    cost = cost.reshape(n, groups, -1)
    freed = (counts.blocks - counts.kept) * layers * heads // groups
    gone = torch.zeros_like(cost, dtype=torch.bool)
    gone.scatter_(2, cost.sort(stable=True).indices[..., :freed], True)
    dropped = gone.view(n, layers * heads, -1).sum(2, keepdim=True) * page
    rank = torch.arange(candidates, device=scores.device)
    kept = torch.ones(n, layers * heads, length, dtype=torch.bool, device=scores.device)
    kept[..., :candidates].scatter_(2, order, rank >= dropped)
    return kept.view(n, layers, heads, length)
