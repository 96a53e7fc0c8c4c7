# SPDX-License-Identifier: Apache-2.0
"""What sharing packed prefixes did between two steps' statistics. No vLLM types."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

from kvcompress_vllm.scheduling.contexts import Context


class Held(NamedTuple):
    """A context that a request could take, for the live page: sizes and no text."""

    name: str
    context_tokens: int
    blocks: int
    blocks_uncompressed: int
    hits: int


@dataclass
class SharedReport:
    """Events since the report before, and the contexts that are held now."""

    hits: int = 0
    """Requests that took a context instead of computing it."""
    misses: int = 0
    """Requests that compute one which others can take."""
    tokens: int = 0
    """Tokens that were not computed."""
    waits: int = 0
    """Requests that waited for another to compute their context, counted on every step."""
    contexts: int = 0
    """That a request could take now."""
    blocks: int = 0
    """Packed blocks of those."""
    saved_blocks: int = 0
    """Blocks that requests would hold in addition now, had each of them its own."""
    held: list[Held] | None = None
    """Least recently used first; None: about as before."""


class SharedRecorder:
    """Collects one engine's events between two reports."""

    def __init__(self) -> None:
        self._report = SharedReport()
        self._held: list[Held] = []
        self._told = 0.0

    def started(self, found: int, wanted: bool) -> None:
        """Note a request that starts its prefill.

        Args:
            found: tokens that it does not compute, for it takes a context; 0: it takes none.
            wanted: it has contexts, and computes those that it does not take.
        """
        if found:
            self._report.hits += 1
            self._report.tokens += found
        elif wanted:
            self._report.misses += 1

    def waited(self, requests: int) -> None:
        """Note that so many requests wait on this step."""
        self._report.waits += requests

    def take(self, contexts: Collection[Context], in_use: Collection[Context]) -> SharedReport:
        """The events since the last call, with the state now.

        Args:
            contexts: that a request could take.
            in_use: those and others that requests use.
        """
        report, self._report = self._report, SharedReport()
        report.contexts = len(contexts)
        report.blocks = sum(len(context.blocks) for context in contexts)
        report.saved_blocks = saved_blocks(in_use)
        held = [
            Held(c.name, c.num_tokens, c.packing.kept, c.packing.covered, c.hits) for c in contexts
        ]
        others = {item.name for item in held} != {item.name for item in self._held}
        if others or (held != self._held and monotonic() - self._told > PAUSE):
            report.held = self._held = held
            self._told = monotonic()
        return report


PAUSE = 1.0
"""Seconds between two lists of the same contexts."""


def saved_blocks(contexts: Collection[Context]) -> int:
    """Blocks that the users of these hold together, in all but one of their rows."""
    return sum(max(0, len(c.users) - 1) * len(c.blocks) for c in contexts)
