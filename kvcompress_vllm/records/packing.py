# SPDX-License-Identifier: Apache-2.0
"""How far a request is packed, and the arithmetic of its blocks.

A packed block may hold the keys of several full blocks, in fewer bits: of m, or
``blocks_per_page``.
"""

from __future__ import annotations

from typing import NamedTuple


class Packing(NamedTuple):
    """The first F blocks' worth of tokens lie in C packed blocks; (0, 0): nothing is packed.

    ::

        row           ■ ■ ■ ∅ ∅ ∅ ∅ ∅ □ □ ▫      C packed blocks, F - C null blocks, tail
                      |- C -|         |
                      |----- F -------|
        held          ■ ■ ■           □ □ ▫      row - F + C
        candidates of a compression that covers F' = 10 blocks: ■ ■ ■ □ □, C + F' - F
    which all fit into C + (F' - F) / m packed blocks
    """

    covered: int = 0
    """F, full blocks."""
    kept: int = 0
    """C, blocks that their keys are packed into."""

    def held(self, row: int) -> int:
        """Blocks that a request holds whose row is ``row`` blocks long."""
        return row - self.covered + self.kept

    def candidates(self, covered: int) -> int:
        """Blocks whose keys compete when the first ``covered`` full blocks are compressed."""
        return self.held(covered)

    def all_kept(self, covered: int, blocks_per_page: int) -> int:
        """C that holds every key when the first ``covered`` full blocks are compressed.

        Args:
            covered: F', as F a multiple of ``blocks_per_page``.
        """
        return self.kept + (covered - self.covered) // blocks_per_page

    def gives_back(self, new: Packing) -> int:
        """Blocks that a request gives back when it is packed anew."""
        return self.held(new.covered) - new.kept

    @property
    def gains(self) -> bool:
        """Whether packing what was not packed before gives any block back."""
        return self.kept < self.covered
