# SPDX-License-Identifier: Apache-2.0
"""What layers hold of a request that keep a bounded part of it: with a window, in chunks, or with a
state in the place of keys (Mamba, linear attention).

vLLM gives back what lies before, so beside a long request it is little, and about the same whatever
the request's length. No vLLM types.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Local(NamedTuple):
    """Layers of one cache group that see a part of the context.

    Attributes:
        span: tokens that a query may see.
        aligned: whether they begin with a whole block, as chunks do.
    """

    span: int
    aligned: bool = False

    def blocks(self, num_tokens: int, in_flight: int, block_size: int) -> int:
        """The most blocks of a request of ``num_tokens`` tokens.

        Args:
            in_flight: tokens of it that steps may compute at once; they keep what the first of
                them sees.
        """
        seen = -(-min(num_tokens, self.span + in_flight) // block_size)
        return min(-(-num_tokens // block_size), seen + (not self.aligned))

    def held(self, num_tokens: int, block_size: int, drafts: int = 0) -> int:
        """Blocks of a request that decodes, and whose latest token is the ``num_tokens``-th.

        Args:
            drafts: tokens behind that, which may be rejected: until then they pass nothing.
        """
        before = num_tokens - 1
        passed = before // self.span * self.span if self.aligned else max(0, before - self.span)
        return -(-(num_tokens + drafts) // block_size) - passed // block_size


class State(NamedTuple):
    """Layers of one cache group that keep a state of a request and no keys.

    Attributes:
        states: of a request, a block each.
    """

    states: int = 1

    def blocks(self, num_tokens: int, in_flight: int, block_size: int) -> int:
        """As of :class:`Local`."""
        return self.states

    def held(self, num_tokens: int, block_size: int, drafts: int = 0) -> int:
        """As of :class:`Local`."""
        return self.states


class LocalLayers(NamedTuple):
    """All of a model's.

    Attributes:
        groups: one for each cache group.
        in_flight: tokens that steps may compute at once of a prompt.
        drafts: tokens that a step of a generation may compute beyond its next.
    """

    groups: Sequence[Local | State]
    block_size: int
    in_flight: int
    drafts: int = 0

    def most(self, num_tokens: int) -> int:
        """The most blocks of a request that is to have ``num_tokens`` tokens, while its prompt is
        computed."""
        return self._blocks(num_tokens, self.in_flight)

    def decoding(self, num_tokens: int) -> int:
        """The most blocks of one that has ``num_tokens`` tokens, and decodes."""
        return self._blocks(num_tokens, 2 + self.drafts)

    def growth(self, num_tokens: int, more: int) -> int:
        """By how many blocks a request that decodes will grow at most within ``more`` tokens."""
        # A row grows where a block begins, and gives blocks back in between.
        size, end = self.block_size, num_tokens + self.drafts
        later = range(-(-end // size) * size + 1 - self.drafts, num_tokens + more + 1, size)
        return sum(
            max(group.held(n, size, self.drafts) for n in (num_tokens, *later))
            - group.held(num_tokens, size)
            for group in self.groups
        )

    def _blocks(self, num_tokens: int, in_flight: int) -> int:
        end = num_tokens + self.drafts
        return sum(group.blocks(end, in_flight, self.block_size) for group in self.groups)
