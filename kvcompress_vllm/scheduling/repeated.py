# SPDX-License-Identifier: Apache-2.0
"""Prefixes that come again, found without being told (``share=auto``). No vLLM types, no text.

A request's context is what it has in common with one before it: a system prompt, a document. Which
that is depends on who came before, so answers do, too; that is why nobody has it unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

STRIDE = 256
"""Contexts that are found end at multiples of it, so that others end at the same place."""

MOST_SEEN = 1 << 16
"""Places of prompts that are remembered, 16 million tokens; the least recently seen go first."""

LONGER = 2
"""Times that what was seen before must be longer than a context that is held, to be packed anew."""


class Repeated:
    """Remembers prefixes by their hashes."""

    def __init__(self) -> None:
        self._seen: dict[bytes, None] = {}

    def context(
        self, prefixes: Sequence[tuple[int, bytes]], held: Callable[[int], bool]
    ) -> int | None:
        """Tokens of the context that a new prompt has; None: nothing of it was seen before.

        Args:
            prefixes: lengths of its prefixes, ascending multiples of ``STRIDE``, and their hashes.
            held: whether a context of such a length is held, or is being computed.
        """
        seen = 0
        for length, name in prefixes:
            if name in self._seen:
                seen = length
                del self._seen[name]
            self._seen[name] = None
        while len(self._seen) > MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        for length, _ in reversed(prefixes):
            if length <= seen < LONGER * length and held(length):
                return length
        return seen or None
