# SPDX-License-Identifier: Apache-2.0
"""Which keys get echo scores, and who may use them. No vLLM types, no tensors.

Every prefill is scored where the configured policy reads echo scores, so that whoever comes later
finds them with the cached blocks; else the prefills of requests that chose such a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.budget import Ranges, RequestBudget
from kvcompress_vllm.records.plan import Span
from kvcompress_vllm.scheduling.segments import WholeBlocks, segments, unscored, whole_segments


class EchoPlanner:
    """Says where chunks end, which tokens of a step are scored, and how long hits may be.

    Args:
        config: the resolved options; a policy that may be used reads echo scores.
        block_size: tokens per block; None: nobody gets blocks of others, so that any will do.
        num_blocks: blocks of the pool.
        step_tokens: tokens that a step computes of one request at most.

    Attributes:
        blocks: whose scores others may use; None: nobody.
    """

    def __init__(
        self, config: KVCompressConfig, block_size: int | None, num_blocks: int, step_tokens: int
    ) -> None:
        self.blocks = None if block_size is None else WholeBlocks(num_blocks, block_size)
        self.reads = cache(config.reads_echo)
        self._step_tokens = step_tokens

    def scores(self, policy: str) -> bool:
        """Whether the prefills of requests with this policy are scored."""
        return self.reads(None) or self.reads(policy)

    def chunk(
        self,
        budget: RequestBudget,
        first: int,
        num_tokens: int,
        prefill_end: int,
        due_at: int,
        others: int,
        may_wait: bool = True,
    ) -> int:
        """How many of ``num_tokens`` tokens from position ``first`` on the next step may compute,
        so that segments stay whole. 0 is only said where a later step will have room.

        Args:
            prefill_end: tokens that the prefill computes.
            due_at: where the next compression is due.
            others: tokens that running requests beside it may take of each step.
            may_wait: False: it must go on now, whatever that cuts.
        """
        if first >= prefill_end or not self.scores(budget.policy) or budget.query_stride:
            return num_tokens  # what is observed query by query comes in chunks of its own
        marks = (due_at, prefill_end) if due_at < prefill_end else (prefill_end,)
        room = self._step_tokens - others if may_wait else 0
        return whole_segments(first, num_tokens, marks, room)

    def allocated(self, policy: str, row: Sequence[int], first: int, end: int) -> None:
        """Note that the next step computes tokens ``[first, end)`` into blocks that, from then on,
        the prefix cache may hand to others.

        Args:
            row: block ids from that of token ``first`` on.
        """
        if self.blocks is not None:
            self.blocks.computed(row, first, end, self.scores(policy))

    def span(
        self, request_id: str, policy: str, first: int, end: int, behind: int = 0
    ) -> Span | None:
        """What a step that computes tokens ``[first, end)`` scores; None: nothing.

        Args:
            behind: tokens that it also computes, of a segment that will be scored later.
        """
        if not self.scores(policy) or not any(segments(first, end)):
            return None
        return Span(request_id, first, end, behind)


class Unscored:
    """Positions of a request whose keys have no score."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        """All but the last of them."""
        self._from = self._until = 0
        """The last: it ends where the request does, and grows with each token that is decoded."""

    def computed(self, first: int, end: int, scored: bool) -> None:
        """Note that a step computes tokens ``[first, end)``."""
        if first == self._until and not scored:  # a token is decoded: on every step of everybody
            self._until = end
            return
        # Drafted tokens that were rejected are computed anew.
        known = [(a, min(b, first)) for a, b in self._all() if a < min(b, first)]
        for begin, stop in unscored(first, end) if scored else [(first, end)]:
            if known and known[-1][1] == begin:
                begin, _ = known.pop()
            known.append((begin, stop))
        self._set(known, end)

    def scored(self, first: int, end: int) -> None:
        """Note that ``[first, end)`` have scores now."""
        left = [
            (begin, stop)
            for a, b in self._all()
            for begin, stop in ((a, min(b, first)), (max(a, end), b))
            if begin < stop
        ]
        self._set(left, self._until)

    def packed(self, end: int) -> None:
        """Forget those before ``end``: a compression gave them scores of 0, which it moved."""
        self.scored(0, end)

    def before(self, end: int) -> Ranges:
        """Those before ``end``."""
        return tuple((a, min(b, end)) for a, b in self._all() if a < min(b, end))

    def _all(self) -> list[tuple[int, int]]:
        return [*self._ranges, (self._from, self._until)]

    def _set(self, ranges: list[tuple[int, int]], until: int) -> None:
        self._ranges, self._from, self._until = ranges, until, until
        if ranges and ranges[-1][1] == until:
            self._from, _ = ranges.pop()
