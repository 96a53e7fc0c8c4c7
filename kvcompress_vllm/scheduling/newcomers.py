# SPDX-License-Identifier: Apache-2.0
"""What a request that would start its prefill now takes: slots, a reserve of blocks, and what the
forecast (``admission.py``) goes by."""

from __future__ import annotations

from collections.abc import Mapping

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.scheduling.budgets import Budgets
from kvcompress_vllm.scheduling.contexts import Context
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.mass import ExpectedRatio
from kvcompress_vllm.scheduling.observers import ObservationSlots
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.sizes import NEVER, Sizes
from kvcompress_vllm.scheduling.slots import Slots


class Newcomers:
    """Says what a request would be as it starts, and whether it may.

    Methods that take a ``budget`` take the configured one where it is None.

    Args:
        config: the resolved options.
        limits: of the engine.
        budgets: the sizes of all budgets.
        requests: all that are tracked, by id; changed by the owner.
        state_slots, observers: the slots, taken and given back by the owner.

    Attributes:
        version: changes whenever a request comes, goes or is packed for the first time, and
            whenever something is learnt: until then a forecast stays as it is.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        limits: Limits,
        budgets: Budgets,
        requests: Mapping[str, Tracked],
        state_slots: Slots,
        observers: ObservationSlots,
    ) -> None:
        self.limits = limits
        self.version = 0
        self._config, self._budgets, self._requests = config, budgets, requests
        self._state_slots, self._observers = state_slots, observers
        self._expected = ExpectedRatio(config)

    def starting(
        self,
        request_id: str,
        num_tokens: int,
        budget: RequestBudget | None = None,
        context: Context | None = None,
    ) -> Tracked:
        """A request as it would start its prefill now, without slots.

        Args:
            num_tokens: tokens that its prefill computes: the prompt, and after a preemption the
                output so far.
            context: what it takes instead of computing its first tokens.
        """
        begins = context.num_tokens if context is not None else 0
        sizes = self._budgets.at(self._budgets.sizes(budget), begins, num_tokens)
        tracked = Tracked(request_id, -1, sizes, sizes.first_due(num_tokens), num_tokens)
        tracked.reads_echo = self._observers.reads_echo(sizes.budget.policy)
        if context is not None:
            if context.ratio is not None:
                tracked.sizes = sizes = self._budgets.sizes(
                    sizes.budget._replace(ratio=context.ratio)
                )
            tracked.context, tracked.packing, tracked.curve = (
                context,
                context.packing,
                context.curve,
            )
            tracked.due_at = sizes.next_due(context.packing, context.num_tokens, num_tokens)
            tracked.prefix = context.key if sizes.stride else None
        tracked.trigger = "prefill" if tracked.in_prefill else "decode"
        return tracked

    def have_slots(self, starting: Tracked) -> bool:
        """Whether the slots allow a request, of :meth:`starting`, to start its prefill now."""
        if starting.starts_observed:
            return bool(self._state_slots and self._observers.available)
        return bool(self._state_slots) or not (starting.kept or starting.due_at != NEVER)

    def reserve(self, starting: Tracked | None = None) -> int:
        """Blocks to keep free so that any one request awaiting compression can be packed.

        Args:
            starting: a request about to be admitted.
        """
        waiting = [t.target().kept for t in self._observers.observed]
        if starting is not None and starting.starts_observed:
            waiting.append(starting.target().kept)
        return max(waiting, default=0)

    def forecast(self, budget: RequestBudget | None = None) -> Sizes:
        """The sizes of a budget; of a mass, by what the masses of other requests came to. For
        admission alone: what a request keeps must not depend on others."""
        sizes = self._budgets.sizes(budget)
        if sizes.budget.mass is None:
            return sizes
        return self._budgets.sizes(sizes.budget._replace(ratio=self._expected.ratio))

    def learn(self, packing: Packing) -> None:
        """Learn what a mass budget came to."""
        self._expected.learn(*packing)
        self.version += 1

    def interval(self, num_requests: int) -> int:
        """Blocks by which so many generations outgrow their budgets before they are compressed.

        More than configured where the observation slots do not go round: each is taken for
        ``window`` tokens at a time.
        """
        tokens = self._observers.count * self.limits.block_size
        turn = -(-num_requests * self._config.window // tokens)
        return max(self.limits.interval, turn)

    def hears(self, budget: RequestBudget, tracked: Tracked | None, num_requests: int) -> bool:
        """Whether what a request decodes will be scored, so that some of it can be dropped: where a
        policy reads echo scores and the slots do not go round, only of who listens by now.

        Args:
            tracked: None: it has not started.
        """
        if not self._observers.reads_echo(budget.policy) or budget.mass is not None:
            return True
        listens = tracked is not None and tracked.listen_slot is not None
        return listens or num_requests <= self._observers.count
