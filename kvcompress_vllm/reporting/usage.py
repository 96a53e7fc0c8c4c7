# SPDX-License-Identifier: Apache-2.0
"""What compression did to a request, for its response. No vLLM types.

The scheduler notes every compression, and what was accepted of drafted tokens, in
:class:`UsageLog` and sends the :class:`Counts` of a request with its next token; the front end adds
them up over the sequences of a request (``n``) in a :class:`CompressionUsage`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.plan import Compression


class Counts(NamedTuple):
    """Of one sequence; see :class:`CompressionUsage`."""

    compressions: int = 0
    blocks_before: int = 0
    blocks_after: int = 0
    shared_blocks: int = 0
    context_tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass
class CompressionUsage:
    """Of one request, summed over its sequences; all 0 if it was never compressed.

    Attributes:
        compressions: how many there were.
        blocks_before: blocks it would have held at the last one, had nothing ever been dropped; one
            that was never compressed itself but took a packed context, when it started.
        blocks_after: blocks it held just after that.
        shared_blocks: packed blocks of a context that it took instead of computing it.
        context_tokens: of its prompt, what was packed as a context, by itself or another: whole
            blocks of what it asked for, or packed pages.
        bytes_before, bytes_after: those blocks as bytes of KV cache, of all layers and ranks.
        draft_tokens, accepted_tokens: of speculative decoding, packed or not.
    """

    compressions: int = 0
    blocks_before: int = 0
    blocks_after: int = 0
    shared_blocks: int = 0
    context_tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, new: Counts, old: Counts = Counts()) -> None:  # noqa: B008 - immutable
        """Count what a sequence reports, and no longer what it reported before."""
        for name, count, former in zip(Counts._fields, new, old, strict=True):
            setattr(self, name, getattr(self, name) + count - former)


class UsageLog:
    """The counts of all live requests of one engine, and which are still to be sent.

    Args:
        block_bytes: of a block, over all layers and ranks.
    """

    def __init__(self, block_bytes: int = 0) -> None:
        self._block_bytes = block_bytes
        self._counts: dict[str, Counts] = {}
        self._unsent: set[str] = set()

    def compressed(self, item: Compression, context: int | None = None) -> None:
        """Note a compression that the workers will carry out.

        Args:
            context: tokens of the request's context.
        """
        known, row = self._counts.get(item.request_id, Counts()), len(item.old_blocks)
        after = item.packing.held(row)
        if item.num_tokens == context:
            known = known._replace(context_tokens=context)
        known = known._replace(compressions=known.compressions + 1)
        self._counts[item.request_id] = self._held(known, row, after)
        self._unsent.add(item.request_id)

    def took(self, request_id: str, num_tokens: int, packing: Packing, row: int) -> None:
        """Note that a request starts with a packed context of ``num_tokens`` tokens.

        Args:
            row: blocks of its row at that time.
        """
        known = self._counts.get(request_id, Counts())
        known = known._replace(shared_blocks=packing.kept, context_tokens=num_tokens)
        self._counts[request_id] = self._held(known, row, packing.held(row))
        self._unsent.add(request_id)

    def verified(self, request_id: str, drafted: int, accepted: int) -> None:
        """Note what a step made of the drafted tokens of a request."""
        known = self._counts.get(request_id, Counts())
        self._counts[request_id] = known._replace(
            draft_tokens=known.draft_tokens + drafted,
            accepted_tokens=known.accepted_tokens + accepted,
        )
        self._unsent.add(request_id)

    def _held(self, counts: Counts, before: int, after: int) -> Counts:
        size = self._block_bytes
        return counts._replace(
            blocks_before=before,
            blocks_after=after,
            bytes_before=before * size,
            bytes_after=after * size,
        )

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(self._unsent)

    def take(self, request_id: str) -> Counts | None:
        """What to send for a request that has an output now."""
        if request_id not in self._unsent:
            return None
        self._unsent.remove(request_id)
        return self._counts[request_id]

    def keep(self, request_ids: Container[str]) -> None:
        """Forget all other requests."""
        self._counts = {key: value for key, value in self._counts.items() if key in request_ids}
        self._unsent &= self._counts.keys()
