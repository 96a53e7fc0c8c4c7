# SPDX-License-Identifier: Apache-2.0
"""What compression did to a request, for its response. No vLLM types.

The scheduler notes every compression in :class:`UsageLog` and sends the :class:`Counts` of a
request with its next token; the front end adds them up over the sequences of a request (``n``) in
a :class:`CompressionUsage`.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from kvcompress_vllm.records.plan import Compression


class Counts(NamedTuple):
    """Of one sequence; see :class:`CompressionUsage`."""

    compressions: int = 0
    blocks_before: int = 0
    blocks_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass
class CompressionUsage:
    """Of one request, summed over its sequences; all 0 if it was never compressed.

    Attributes:
        compressions: how many there were.
        blocks_before: blocks it would have held at the last one, had nothing ever been dropped.
        blocks_after: blocks it held just after the last one.
        bytes_before, bytes_after: the same in bytes of KV cache, of all layers and ranks.
    """

    compressions: int = 0
    blocks_before: int = 0
    blocks_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, new: Counts, old: Counts = Counts()) -> None:  # noqa: B008 - immutable
        """Count what a sequence reports, and no longer what it reported before."""
        self.compressions += new.compressions - old.compressions
        self.blocks_before += new.blocks_before - old.blocks_before
        self.blocks_after += new.blocks_after - old.blocks_after
        self.bytes_before += new.bytes_before - old.bytes_before
        self.bytes_after += new.bytes_after - old.bytes_after


class UsageLog:
    """The counts of all live requests of one engine, and which are still to be sent.

    Args:
        block_bytes: of a block, over all layers and ranks.
    """

    def __init__(self, block_bytes: int = 0) -> None:
        self._block_bytes = block_bytes
        self._counts: dict[str, Counts] = {}
        self._unsent: set[str] = set()

    def compressed(self, item: Compression) -> None:
        """Note a compression that the workers will carry out."""
        times = self._counts.get(item.request_id, Counts()).compressions
        row = len(item.old_blocks)
        after = item.packing.held(row)
        size = self._block_bytes
        self._counts[item.request_id] = Counts(times + 1, row, after, row * size, after * size)
        self._unsent.add(item.request_id)

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
