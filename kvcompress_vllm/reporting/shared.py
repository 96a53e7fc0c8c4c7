# SPDX-License-Identifier: Apache-2.0
"""What sharing packed prefixes did between two steps' statistics. No vLLM types."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from kvcompress_vllm.scheduling.contexts import Context


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


class SharedRecorder:
    """Collects one engine's events between two reports."""

    def __init__(self) -> None:
        self._report = SharedReport()

    def started(self, context: Context | None, wanted: bytes | None) -> None:
        """Note a request that starts its prefill with a context, or computes one (``wanted``)."""
        if context is not None:
            self._report.hits += 1
            self._report.tokens += context.num_tokens
        elif wanted is not None:
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
        return report


def saved_blocks(contexts: Collection[Context]) -> int:
    """Blocks that the users of these hold together, in all but one of their rows."""
    return sum(max(0, len(c.users) - 1) * len(c.blocks) for c in contexts)
