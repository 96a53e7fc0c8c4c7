# SPDX-License-Identifier: Apache-2.0
"""What comes next for a request: when it is compressed, and with whom it shares until then."""

from __future__ import annotations

from kvcompress_vllm.scheduling.budgets import Budgets
from kvcompress_vllm.scheduling.contexts import Contexts
from kvcompress_vllm.scheduling.observers import ObservationSlots
from kvcompress_vllm.scheduling.request import Tracked


class Course:
    """Takes requests from one compression to the next.

    Args:
        observers: who is observed.
        contexts: packed prefixes that requests share.
        budgets: the sizes of all budgets.
    """

    def __init__(self, observers: ObservationSlots, contexts: Contexts, budgets: Budgets) -> None:
        self._observers, self._contexts, self._budgets = observers, contexts, budgets

    def prepare(self, tracked: Tracked, due_at: int) -> None:
        """Observe a request from now on, and compress it at ``due_at`` tokens."""
        self._observers.observe(tracked)
        tracked.due_at = due_at

    def go_on(self, tracked: Tracked, due_at: int) -> None:
        """Compress it at ``due_at`` tokens next; observed until then if its prefill is not over."""
        tracked.due_at = due_at
        if due_at > (tracked.sizes.context or 0):
            self.stop_computing(tracked)  # nobody waits for what will not be packed
        if not tracked.in_prefill:
            tracked.trigger = "decode"
        if not tracked.starts_observed:
            self._observers.stop(tracked)

    def stop_computing(self, tracked: Tracked) -> None:
        """Let those go on who await the context that it computes."""
        for key in tracked.wanted.values():
            self._contexts.stop(key, tracked.request_id)
        tracked.wanted = {}

    def packed_context(self, tracked: Tracked) -> None:
        """Let those go on who await the context that it has just packed. It goes on to the next,
        if it is to compute one."""
        key = tracked.wanted.pop(tracked.due_at, None)
        if key is not None:
            self._contexts.stop(key, tracked.request_id)
        tracked.sizes = self._budgets.at(tracked.sizes, tracked.due_at, tracked.prefill_end)

    def at_mark(self, tracked: Tracked, num_computed: int, key: bytes | None) -> None:
        """Before a request with a stride is compressed: others can have what it keeps, if that is
        where its stride says and follows from its tokens.

        Args:
            num_computed: computed tokens; more than it was due at where it had to wait.
            key: of the context; None: not all its tokens are known yet.
        """
        now = tracked.due_at
        if now != tracked.sizes.context or now != num_computed or not tracked.is_told_by_tokens:
            self.leave_stride(tracked)
            return
        tracked.prefix, tracked.cached = key, now
        if key is not None:
            tracked.wanted[now] = key

    def leave_stride(self, tracked: Tracked) -> None:
        """Compress it from now on as one without a stride: what it keeps no longer follows from its
        tokens alone, so that nobody else can have it."""
        if tracked.sizes.stride:
            self.stop_computing(tracked)
            held = None if tracked.context is None else tracked.context.num_tokens
            tracked.sizes = self._budgets.without_stride(tracked.sizes, held)
            tracked.prefix = None

    def end(self, tracked: Tracked) -> None:
        """Give back what it holds with others: its observation slot, and its context."""
        self._observers.stop(tracked)
        self.stop_computing(tracked)
        if tracked.context is not None:
            self._contexts.leave(tracked.context, tracked.request_id)
            tracked.context = None
