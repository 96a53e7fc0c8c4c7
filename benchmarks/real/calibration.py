# SPDX-License-Identifier: Apache-2.0
"""Heads' scores on one scale, measured once per model.

Echo ranks the keys of a head nearly as a real repetition would, but its scale differs from head to
head: what it foresees of heads that look for what followed before (induction) is too low. A table
per head maps quantiles of the foreseen scores to those of real repetitions of a few texts. It keeps
the order within a head and moves budget between heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

KNOTS = 64
LEAST = 1e-9


class Table:
    """Monotone maps, one per layer and head.

    Args:
        foreseen: ``[L, H, N]`` scores of N keys, in any order.
        exact: ``[L, H, N]``, what a real repetition gives.
    """

    def __init__(self, foreseen: Tensor, exact: Tensor) -> None:
        # Budgets are decided by the highest scores: knots get denser towards them.
        rare = torch.logspace(0, -3, KNOTS, device=foreseen.device)
        levels = (1 - rare).clamp(0, 1)
        self.source = _quantiles(foreseen, levels).clamp(min=LEAST).log()
        self.target = _quantiles(exact, levels).clamp(min=LEAST).log()
        self.shift = (self.target - self.source)[..., KNOTS // 2 :].mean(-1)

    def __call__(self, scores: Tensor) -> Tensor:
        """``[..., L, H, P]`` scores on the common scale; linear between knots, in logarithms."""
        x = scores.clamp(min=LEAST).log()
        source = self.source.expand(*x.shape[:-1], -1).contiguous()
        target = self.target.expand(*x.shape[:-1], -1)
        upper = torch.searchsorted(source, x.contiguous()).clamp(1, KNOTS - 1)
        x0, x1 = source.gather(-1, upper - 1), source.gather(-1, upper)
        y0, y1 = target.gather(-1, upper - 1), target.gather(-1, upper)
        part = ((x - x0) / (x1 - x0).clamp(min=1e-6)).clamp(0, 1)
        # Above all knots, as far above as it was.
        return (y0 + part * (y1 - y0) + (x - source[..., -1:]).clamp(min=0)).exp()

    def scaled(self, scores: Tensor) -> Tensor:
        """The same with one factor per head instead of a map."""
        return scores * self.shift.exp()[..., None]


def _quantiles(scores: Tensor, levels: Tensor) -> Tensor:
    ordered = scores.float().sort(-1).values
    index = (levels * (ordered.shape[-1] - 1)).long()
    return ordered[..., index]


def tables(foreseen: Iterable[Mapping[str, Tensor]], exact: Iterable[Tensor]) -> dict[str, Table]:
    """A table for every kind of score, from several contexts."""
    every = list(foreseen)
    real = torch.cat(list(exact), -1)
    return {name: Table(torch.cat([x[name] for x in every], -1), real) for name in every[0]}
