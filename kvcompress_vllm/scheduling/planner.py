# SPDX-License-Identifier: Apache-2.0
"""Which requests are observed and compressed, and when. No vLLM types, no tensors.

Life of a compressible request:

1. ``admit`` when vLLM starts its prefill: it takes a state slot, and an observation slot if its
   prompt is to be compressed: at its end, and before where it asked for that or exceeds
   ``prefill_peak_tokens``; ``chunk`` ends the prefill's steps there;
2. ``observe`` on each step that computes one of the last ``window`` tokens before the compression;
   with a policy that judges by all queries on each step of the prefill, after each of which
   ``accumulate`` says what was observed;
3. due once all of them are computed (with a mass budget, once ``to_score`` had the worker score
   the keys and ``feedback`` took C from its loss curve), until ``compressed`` on a later step; if
   the pool cannot spare the packed blocks it stays due and decodes uncompressed meanwhile;
4. ``generations.watch`` while it decodes: shortly before it has outgrown its budget by ``interval``
   blocks it takes an observation slot again, and goes on at 2; when the pool runs short, ``press``
   does so earlier for those that lose least;
5. ``release`` when it finishes, is aborted or is preempted; a preempted request is admitted anew.

How many blocks and when is in ``sizes.py``, who may start in ``newcomers.py``, what is observed in
``observation.py``, with which slot in ``observers.py``, who is observed again in
``generations.py``, who goes first in ``pressure.py``, what comes after that in ``course.py``, what
workers say of it in ``feedback.py``; here are the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import RequestBudget, united
from kvcompress_vllm.records.plan import Observation, Observed
from kvcompress_vllm.scheduling import observation
from kvcompress_vllm.scheduling.budgets import Budgets
from kvcompress_vllm.scheduling.contexts import Context, Contexts
from kvcompress_vllm.scheduling.course import Course
from kvcompress_vllm.scheduling.feedback import Feedback
from kvcompress_vllm.scheduling.generations import Generations
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.newcomers import Newcomers
from kvcompress_vllm.scheduling.observers import ObservationSlots
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.sizes import NEVER, Sizes, check_peak
from kvcompress_vllm.scheduling.slots import Slots
from kvcompress_vllm.scheduling.unverified import Unverified


class CompressionPlanner:
    """Keeps the slots and the state of every compressible request.

    Methods that take a ``budget`` take the configured one where it is None; ``num_computed`` is how
    many tokens of each running request are computed.

    Args:
        config: the resolved options.
        block_size: tokens per block.
        state_slots: how many requests can be packed at once.
        observe_slots: how many requests can be observed at once.
        max_tokens: longest possible request, prompt and output.
        context_slots: how many packed prefixes can be held for others.
        drafts: tokens that a step of a generation may compute beyond its next, some to be rejected.
        kernel_blocks: kernel blocks of a block.

    Attributes:
        observers: who is observed.
        contexts: packed prefixes that requests share.
        newcomers: what a request would take that starts now.
        generations: gives observation slots to decoding requests.
        feedback: is told what workers report.
        unverified: what is drafted in steps in flight. ``num_computed`` is without.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        block_size: int,
        state_slots: int,
        observe_slots: int,
        max_tokens: int,
        context_slots: int = 0,
        drafts: int = 0,
        kernel_blocks: int = 1,
    ) -> None:
        self.config = config
        self.unverified = Unverified()
        self.limits = Limits.of(config, block_size, max_tokens, kernel_blocks)
        self.requests: dict[str, Tracked] = {}
        self.observers = ObservationSlots(config, observe_slots, self.requests)
        self.contexts = Contexts(range(state_slots, state_slots + context_slots))
        self._state_slots = Slots(state_slots)
        self._admitted = 0
        self._released: list[int] = []
        self._vacated: list[int] = []
        self._budgets = Budgets(resolve(config), self.limits)
        self.newcomers = Newcomers(
            config, self.limits, self._budgets, self.requests, self._state_slots, self.observers
        )
        self._course = Course(self.observers, self.contexts, self._budgets)
        self.generations = Generations(
            config,
            self.limits,
            self.requests,
            self.observers,
            self._course,
            self.unverified,
            drafts,
        )
        self.feedback = Feedback(
            self.requests, self.contexts, self._budgets, self.newcomers, self._course
        )
        observation.check_steps(config, block_size, block_size)
        check_peak(config, self.sizes())

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.limits.block_size

    def sizes(self, budget: RequestBudget | None = None) -> Sizes:
        """How many blocks a request with this budget keeps, at any length."""
        return self._budgets.sizes(budget)

    def marks(self, sizes: Sizes, num_tokens: int) -> list[int]:
        """Tokens at which a prompt of ``num_tokens`` is packed for others as well, ascending."""
        return self._budgets.marks(sizes, num_tokens)

    def admit(
        self,
        request_id: str,
        num_tokens: int,
        budget: RequestBudget | None = None,
        context: Context | None = None,
        wanted: Mapping[int, bytes] | None = None,
    ) -> None:
        """Start to track a request; one that will never be compressed is not tracked.

        Args:
            num_tokens, context: as of ``newcomers.starting``.
            wanted: contexts that it is to compute for others as well: key by tokens.

        Raises:
            RuntimeError: it is tracked already, or there is no slot (ask ``newcomers.have_slots``).
        """
        self.newcomers.version += 1
        tracked = self.newcomers.starting(request_id, num_tokens, budget, context)
        if tracked.due_at == NEVER and not tracked.kept:
            return
        if request_id in self.requests or not self.newcomers.have_slots(tracked):
            raise RuntimeError(
                f"kv_compress: cannot admit {request_id}: tracked={request_id in self.requests}, "
                f"{len(self._state_slots)} state and {self.observers.available} observation slots"
            )
        self._admitted += 1
        tracked.number, tracked.state_slot = self._admitted, self._state_slots.take()
        if tracked.starts_observed:
            self.observers.observe(tracked)
        if context is not None:
            self.contexts.join(context, request_id)
        if wanted and tracked.due_at <= (tracked.sizes.context or 0):
            tracked.wanted = {n: key for n, key in wanted.items() if n >= tracked.due_at}
            for key in tracked.wanted.values():
                self.contexts.begin(key, request_id)
        self.requests[request_id] = tracked

    def release(self, request_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted; unknown ones are fine."""
        self.newcomers.version += 1
        tracked = self.requests.pop(request_id, None)
        if tracked is None:
            return
        self._course.end(tracked)
        self._state_slots.give(tracked.state_slot)
        self._released.append(tracked.state_slot)

    def chunk(self, tracked: Tracked, first_token: int, num_tokens: int) -> int:
        """How many of ``num_tokens`` tokens from position ``first_token`` on the next step may
        compute: none beyond a compression that is due in the middle of a prefill, and no more than
        can be observed. May be 0: where only whole blocks will do, and while a loss curve is on its
        way that says what is kept of what was read.

        Args:
            tracked: observed, or about to start so, with any slot.
        """
        return observation.chunk(tracked, self.config.window, first_token, num_tokens)

    def observe(self, tracked: Tracked, first_token: int, num_tokens: int) -> list[Observation]:
        """What to observe of a request's ``num_tokens`` tokens from position ``first_token`` on."""
        if first_token < tracked.prefill_end:
            self.observers.listen_from(tracked, first_token, first_token + num_tokens)
        window = self.config.window
        return list(observation.observe(tracked, window, first_token, num_tokens))

    def observed(self, tracked: Tracked, num_tokens: int) -> Observed | None:
        """What a request's observation slot holds once ``num_tokens`` tokens are computed; None:
        the last ``window`` queries, and there are no accumulated statistics."""
        return observation.observed(tracked, self.config.window, num_tokens)

    def accumulate(self, num_computed: Mapping[str, int]) -> Iterator[tuple[Tracked, Observed]]:
        """Requests in whose prefill something was observed since the last call, and what; their
        compression is not yet due. ``accumulated`` and the like are of after it."""
        return observation.accumulate(self.observers.observed, num_computed, self.config.window)

    def due(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests whose observation is complete, oldest first."""
        return [t for t in self._observed(num_computed) if not (t.awaits_curve or t.awaits_replay)]

    def to_replay(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests that have computed their context, which is to be repeated now."""
        return [t for t in self._observed(num_computed) if t.awaits_replay]

    @property
    def replays(self) -> bool:
        """Whether a request computes, or repeats, a context that is to be repeated."""
        return any(t.awaits_replay for t in self.observers.observed)

    def replayed(self, request_id: str) -> None:
        """Note that a context was repeated: its keys have the scores of that."""
        tracked = self.requests[request_id]
        tracked.replayed = True
        tracked.unscored.scored(0, tracked.due_at)

    def to_score(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests with a mass budget whose observation is complete; each once per compression."""
        ready = [
            tracked
            for tracked in self._observed(num_computed)
            if tracked.awaits_curve
            and not tracked.awaits_replay
            and tracked.scored_at != tracked.due_at
        ]
        for tracked in ready:
            tracked.scored_at = tracked.due_at
        return ready

    def at_mark(self, tracked: Tracked, num_computed: int, key: bytes | None) -> None:
        """See :meth:`Course.at_mark`."""
        self._course.at_mark(tracked, num_computed, key)

    def new_context(self, tracked: Tracked) -> Context | None:
        """What a due request packs for others as well, with a state slot of its own; None: its
        packed blocks will be its own."""
        key = tracked.wanted.get(tracked.due_at)
        if key is None or tracked.due_at != tracked.sizes.context:
            return None
        ratio = tracked.budget.ratio if tracked.budget.mass is not None else None
        return self.contexts.new(key, tracked.due_at, tracked.target(), tracked.request_id, ratio)

    def compressed(
        self, request_id: str, num_computed: int = 0, context: Context | None = None
    ) -> None:
        """Note that a due request is packed as of this step; its observation slot is free.

        Args:
            num_computed: computed tokens; more than it was due at where it had to wait.
            context: which its packed blocks now are, offered to all; None: they are its own.

        Raises:
            RuntimeError: the request was not observed.
        """
        tracked = self.requests[request_id]
        if tracked.observe_slot is None:
            raise RuntimeError(f"kv_compress: {request_id} is compressed without observation")
        self.newcomers.version += not tracked.kept
        now, end, sizes = tracked.due_at, tracked.prefill_end, tracked.sizes
        observation.count(tracked, now, self.observed(tracked, now))
        if tracked.context is not None:
            self.contexts.leave(tracked.context, request_id, compressed=True)
        elif tracked.kept and context is not None:
            self._vacated.append(tracked.state_slot)
        tracked.context = context
        tracked.packing = tracked.target()
        tracked.unheard = united((*tracked.unheard, *tracked.unknown(tracked.covered)))
        tracked.unscored.packed(tracked.covered * self.block_size)
        tracked.curve = tracked.decided = tracked.ratio = None
        if now < num_computed:
            # It will not be packed as others would be who were never late.
            self._course.stop_computing(tracked)
        elif now == sizes.context:
            self._course.packed_context(tracked)
            sizes = tracked.sizes
        due_at = sizes.next_due(tracked.packing, now, end, tracked.whole(tracked.covered))
        if tracked.budget.mass is not None and now >= end:
            # Its ratio is an expectation; it may be off by more than the interval.
            due_at = max(due_at, sizes.after_interval(now))
        if now < num_computed:
            # What was computed while it waited was not observed: a whole window from now on.
            tracked.accumulated = num_computed
            counted = num_computed + self.unverified[request_id]
            due_at = max(due_at, counted + self.config.window)
        self._course.go_on(tracked, due_at)

    def take_released(self) -> list[int]:
        """State slots released since the last call."""
        released, self._released = self._released, []
        return released

    def take_dropped(self) -> list[int]:
        """State slots that describe nothing behind the compressions of the step that is planned."""
        vacated, self._vacated = self._vacated, []
        return self.contexts.take_dropped() + vacated

    def packed(self) -> Iterable[Tracked]:
        """Requests that are packed now."""
        return (t for t in self.requests.values() if t.kept)

    def _observed(self, num_computed: Mapping[str, int]) -> Iterator[Tracked]:
        """Requests whose observation is complete."""
        for tracked in self.observers.observed:
            if num_computed.get(tracked.request_id, 0) >= tracked.due_at:
                yield tracked
