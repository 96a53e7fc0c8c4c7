# SPDX-License-Identifier: Apache-2.0
"""The sizes of every budget that requests come with, kept at hand."""

from __future__ import annotations

from bisect import bisect_right

from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.sizes import NEVER, Sizes

MOST_BUDGETS = 1000
"""Budgets whose sizes are kept at hand; requests may come with any number of them."""


class Budgets:
    """The sizes of all budgets that requests come with; equal budgets share theirs.

    Args:
        configured: of requests that ask for nothing.
    """

    def __init__(self, configured: RequestBudget, limits: Limits) -> None:
        self._configured, self._limits = Sizes(configured, limits), limits
        self._sizes: dict[RequestBudget, Sizes] = {}

    def sizes(self, budget: RequestBudget | None) -> Sizes:
        """Those of a budget; None: of the configured one."""
        if budget is None or budget == self._configured.budget:
            return self._configured
        if budget not in self._sizes:
            self._keep(Sizes(budget, self._limits))
        return self._sizes[budget]

    def at(self, sizes: Sizes, now: int, prefill_end: int) -> Sizes:
        """Those by which a request with a stride goes on after ``now`` tokens: its context is where
        it is compressed next, else the latest place where it was."""
        if not sizes.stride:
            return sizes
        place = bisect_right(sizes.marks, now)
        mark = sizes.marks[place] if place < len(sizes.marks) else NEVER
        if mark == NEVER or (mark > prefill_end and not self._limits.decode):
            mark = sizes.marks[place - 1] if place else 0
        budget = sizes.budget._replace(context_tokens=mark or None)
        if budget not in self._sizes:
            self._keep(Sizes(budget, self._limits, sizes.marks))
        return self._sizes[budget]

    def without_stride(self, sizes: Sizes, context: int | None) -> Sizes:
        """Those by which a request goes on that is not compressed where its stride says.

        Args:
            context: tokens of the context that it has now; None: none.
        """
        return self.sizes(sizes.budget._replace(context_stride=0, context_tokens=context))

    def marks(self, sizes: Sizes, num_tokens: int) -> list[int]:
        """Tokens of a prompt at which what is packed can be shared, ascending.

        Args:
            num_tokens: of the prompt. Behind a context that a request names it must go on.
        """
        if not sizes.stride:
            n = sizes.context
            return [n] if n is not None and sizes.reaches_context else []
        return [mark for mark in sizes.marks if mark <= num_tokens]

    def _keep(self, sizes: Sizes) -> None:
        if len(self._sizes) >= MOST_BUDGETS:
            self._sizes.clear()
        self._sizes[sizes.budget] = sizes
