# SPDX-License-Identifier: Apache-2.0
"""The loss curve of a request: what fewer blocks would cost."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple


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

    def in_blocks_of(self, kernel_blocks: int) -> LossCurve:
        """A curve over kernel blocks over blocks of so many of them."""
        if kernel_blocks == 1:
            return self
        blocks = sorted({-(-count // kernel_blocks) for count in self.blocks})
        return LossCurve(blocks, [self.lost_at(count * kernel_blocks) for count in blocks])

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
