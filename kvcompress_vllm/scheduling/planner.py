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
   the keys and ``scored`` took C from its loss curve), until ``compressed`` on a later step; if
   the pool cannot spare the packed blocks it stays due and decodes uncompressed meanwhile;
4. ``watch`` while it decodes: shortly before it has outgrown its budget by ``interval`` blocks it
   takes an observation slot again, and goes on at 2; when the pool runs short, ``press`` does so
   earlier for those that lose least;
5. ``release`` when it finishes, is aborted or is preempted; a preempted request is admitted anew.

How many blocks and when is in ``sizes.py``, what is observed in ``observation.py``, with which slot
in ``observers.py``, who goes first in ``pressure.py``; here are the requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.budget import RequestBudget, united
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.records.plan import Observation, Observed
from kvcompress_vllm.records.report import Report, Scored
from kvcompress_vllm.scheduling import observation, pressure
from kvcompress_vllm.scheduling.contexts import Context, Contexts
from kvcompress_vllm.scheduling.mass import ExpectedRatio, decide, rounded_ratio
from kvcompress_vllm.scheduling.observers import ObservationSlots
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.sizes import NEVER, Budgets, Limits, Sizes, check_peak
from kvcompress_vllm.scheduling.slots import Slots


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

    Attributes:
        observers: who is observed.
        contexts: packed prefixes that requests share.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        block_size: int,
        state_slots: int,
        observe_slots: int,
        max_tokens: int,
        context_slots: int = 0,
    ) -> None:
        self.config = config
        self.limits = Limits.of(config, block_size, max_tokens)
        self.requests: dict[str, Tracked] = {}
        self.version = 0
        """Changes whenever a request comes, goes or is packed for the first time."""
        self.observers = ObservationSlots(config, observe_slots, self.requests)
        self.contexts = Contexts(range(state_slots, state_slots + context_slots))
        self._state_slots = Slots(state_slots)
        self._released: list[int] = []
        self._vacated: list[int] = []
        self._budgets = Budgets(resolve(config), self.limits)
        self._expected = ExpectedRatio(config)
        observation.check_steps(config, block_size, block_size)
        check_peak(config, self.sizes())

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.limits.block_size

    def sizes(self, budget: RequestBudget | None = None) -> Sizes:
        """How many blocks a request with this budget keeps, at any length."""
        return self._budgets.sizes(budget)

    def forecast(self, budget: RequestBudget | None = None) -> Sizes:
        """As ``sizes``; of a mass, what the masses of other requests came to. For admission alone:
        what a request keeps must not depend on others."""
        sizes = self.sizes(budget)
        if sizes.budget.mass is None:
            return sizes
        return self.sizes(sizes.budget._replace(ratio=self._expected.ratio))

    def interval(self, num_requests: int) -> int:
        """Blocks by which so many generations outgrow their budgets before they are compressed.

        More than configured where the observation slots do not go round: each is taken for
        ``window`` tokens at a time.
        """
        turn = -(-num_requests * self.config.window // (self.observers.count * self.block_size))
        return max(self.config.interval, turn)

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
        sizes = self.sizes(budget)
        tracked = Tracked(request_id, -1, sizes, sizes.first_due(num_tokens), num_tokens)
        tracked.reads_echo = self.observers.reads_echo(sizes.budget.policy)
        if context is not None:
            if context.ratio is not None:
                tracked.sizes = sizes = self.sizes(sizes.budget._replace(ratio=context.ratio))
            tracked.context, tracked.packing, tracked.curve = (
                context,
                context.packing,
                context.curve,
            )
            tracked.due_at = sizes.next_due(context.packing, context.num_tokens, num_tokens)
        tracked.trigger = "prefill" if tracked.in_prefill else "decode"
        return tracked

    def can_admit(
        self,
        num_tokens: int,
        budget: RequestBudget | None = None,
        context: Context | None = None,
    ) -> bool:
        """Whether the slots allow a request of ``num_tokens`` tokens to start its prefill now."""
        return self._have_slots(self.starting("", num_tokens, budget, context))

    def _have_slots(self, starting: Tracked) -> bool:
        if starting.in_prefill:
            return bool(self._state_slots and self.observers.available)
        return bool(self._state_slots) or not (starting.kept or starting.due_at != NEVER)

    def admit(
        self,
        request_id: str,
        num_tokens: int,
        budget: RequestBudget | None = None,
        context: Context | None = None,
        wanted: bytes | None = None,
    ) -> None:
        """Start to track a request; one that will never be compressed is not tracked.

        Args:
            num_tokens, context: as of ``starting``.
            wanted: key of the context that it is to compute for others as well.

        Raises:
            RuntimeError: it is tracked already, or there is no slot (ask ``can_admit`` first).
        """
        self.version += 1
        tracked = self.starting(request_id, num_tokens, budget, context)
        if tracked.due_at == NEVER and not tracked.kept:
            return
        if request_id in self.requests or not self._have_slots(tracked):
            raise RuntimeError(
                f"kv_compress: cannot admit {request_id}: tracked={request_id in self.requests}, "
                f"{len(self._state_slots)} state and {self.observers.available} observation slots"
            )
        tracked.state_slot = self._state_slots.take()
        if tracked.in_prefill:
            self.observers.observe(tracked)
        if context is not None:
            self.contexts.join(context, request_id)
        elif wanted is not None and tracked.due_at <= (tracked.sizes.context or 0):
            tracked.wanted = wanted
            self.contexts.begin(wanted, request_id)
        self.requests[request_id] = tracked

    def release(self, request_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted; unknown ones are fine."""
        self.version += 1
        tracked = self.requests.pop(request_id, None)
        if tracked is None:
            return
        self.observers.stop(tracked)
        self._stop_sharing(tracked)
        self._state_slots.give(tracked.state_slot)
        self._released.append(tracked.state_slot)

    def reserve(
        self,
        num_tokens: int = 0,
        budget: RequestBudget | None = None,
        context: Context | None = None,
    ) -> int:
        """Blocks to keep free so that any one request awaiting compression can be packed.

        Args:
            num_tokens: prefill length of a request about to be admitted, 0 for none.
        """
        waiting = [t.target().kept for t in self.requests.values() if t.observe_slot is not None]
        if num_tokens:
            starting = self.starting("", num_tokens, budget, context)
            if starting.in_prefill:
                waiting.append(starting.target().kept)
        return max(waiting, default=0)

    def chunk(
        self,
        request_id: str,
        first_token: int,
        num_tokens: int,
        prefill_end: int = 0,
        budget: RequestBudget | None = None,
        context: Context | None = None,
    ) -> int:
        """How many of ``num_tokens`` tokens from position ``first_token`` on the next step may
        compute: none beyond a compression that is due in the middle of a prefill, and no more than
        can be observed. May be 0: where only whole blocks will do, and while a loss curve is on its
        way that says what is kept of what was read.

        Args:
            prefill_end: tokens of a prefill that is not admitted yet; ``budget`` is its, and
                ``context`` what it takes.
        """
        tracked = self.requests.get(request_id)
        if tracked is None:
            tracked = self.starting(request_id, prefill_end, budget, context)
            tracked.observe_slot = -1
        return observation.chunk(tracked, self.config.window, first_token, num_tokens)

    def observe(self, request_id: str, first_token: int, num_tokens: int) -> Observation | None:
        """What to observe of a request's ``num_tokens`` tokens from position ``first_token`` on."""
        tracked = self.requests.get(request_id)
        if tracked is None:
            return None
        return observation.observe(tracked, self.config.window, first_token, num_tokens)

    def observed(self, tracked: Tracked, num_tokens: int) -> Observed | None:
        """What a request's observation slot holds once ``num_tokens`` tokens are computed; None:
        the last ``window`` queries, and there are no accumulated statistics."""
        return observation.observed(tracked, self.config.window, num_tokens)

    def accumulate(self, num_computed: Mapping[str, int]) -> Iterator[tuple[Tracked, Observed]]:
        """Requests in whose prefill something was observed since the last call, and what; their
        compression is not yet due. ``accumulated`` and the like are of after it."""
        return observation.accumulate(self.requests.values(), num_computed, self.config.window)

    def watch(self, num_computed: Mapping[str, int]) -> None:
        """Give observation slots to decoding requests that will soon have outgrown their budget."""
        if not self.observers.available:
            return
        near = observation.outgrowing(self.requests.values(), num_computed, self.config.window)
        for computed, tracked in near:
            if not self.observers.available:
                return
            # Late (no slot was free, or a prefill passed the mark): a whole window from now.
            due_at = max(tracked.due_at, computed + self.config.window)
            later = tracked.outgrown_at(due_at)
            if later > due_at:
                tracked.due_at = later  # it was not heard meanwhile, so it would keep more
                continue
            self._prepare(tracked, due_at)

    def press(self, num_computed: Mapping[str, int], num_free: int) -> None:
        """When the pool runs short, prepare early compressions, lowest loss per block first.

        Short means: fewer free blocks than the running requests will take until a compression that
        is prepared now is carried out, and than its copy takes.

        Args:
            num_free: free blocks of the pool.
        """
        early = pressure.early(
            self.requests.values(),
            num_computed,
            num_free,
            self.limits,
            self.config.window,
            self.config.max_ratio,
            self.observers.available,
        )
        for item in early:
            tracked = item.tracked
            tracked.usual_due = tracked.due_at
            self._prepare(tracked, item.due_at)
            tracked.ratio, tracked.trigger = item.ratio, "pressure"

    def due(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests whose observation is complete, oldest first."""
        return [t for t in self._observed(num_computed) if not (t.awaits_curve or t.awaits_replay)]

    def to_replay(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests that have computed their context, which is to be repeated now."""
        return [t for t in self._observed(num_computed) if t.awaits_replay]

    @property
    def replays(self) -> bool:
        """Whether a request computes, or repeats, a context that is to be repeated."""
        return any(t.awaits_replay for t in self.requests.values())

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

    def scored(self, scored: Scored) -> None:
        """Fix C of a request from its loss curve. One that has gone since, or has come back anew,
        is left alone. If there is nothing to gain, it is not compressed this time."""
        tracked = self.requests.get(scored.request_id)
        if (
            tracked is None
            or not tracked.awaits_curve
            or (tracked.state_slot, tracked.due_at) != (scored.state_slot, scored.num_tokens)
        ):
            return
        covered, kept = decide(tracked, scored.curve)
        self._expected.learn(covered, kept)
        self.version += 1
        expected = rounded_ratio(covered / kept)
        tracked.sizes = self.sizes(tracked.budget._replace(ratio=expected))
        if tracked.packing.gives_back(Packing(covered, kept)) > 0:
            tracked.decided = kept
            return
        self._stop_computing(tracked)
        if tracked.due_at < tracked.prefill_end:
            sizes, packing = tracked.sizes, tracked.packing
            self._go_on(tracked, sizes.next_due(packing, tracked.due_at, tracked.prefill_end))
        else:
            self._go_on(tracked, tracked.sizes.after_interval(tracked.due_at))

    def new_context(self, tracked: Tracked) -> Context | None:
        """What a due request packs for others as well, with a state slot of its own; None: its
        packed blocks will be its own."""
        if tracked.wanted is None or tracked.due_at != tracked.sizes.context:
            return None
        ratio = tracked.budget.ratio if tracked.budget.mass is not None else None
        return self.contexts.new(
            tracked.wanted, tracked.due_at, tracked.target(), tracked.request_id, ratio
        )

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
        self.version += not tracked.kept
        now, end, sizes = tracked.due_at, tracked.prefill_end, tracked.sizes
        observation.count(tracked, now, self.observed(tracked, now))
        if tracked.context is not None:
            self.contexts.leave(tracked.context, request_id, compressed=True)
        elif tracked.kept and context is not None:
            self._vacated.append(tracked.state_slot)
        tracked.context = context
        if now == sizes.context or now < num_computed:
            # It is packed there, or will not be as others would be who were never late.
            self._stop_computing(tracked)
        tracked.packing = tracked.target()
        tracked.unheard = united((*tracked.unheard, *tracked.unknown(tracked.covered)))
        tracked.unscored.packed(tracked.covered * self.block_size)
        tracked.curve = tracked.decided = tracked.ratio = None
        due_at = sizes.next_due(tracked.packing, now, end, tracked.whole(tracked.covered))
        if tracked.budget.mass is not None and now >= end:
            # Its ratio is an expectation; it may be off by more than the interval.
            due_at = max(due_at, sizes.after_interval(now))
        if now < num_computed:
            # What was computed while it waited was not observed: a whole window from now on.
            tracked.accumulated = num_computed
            due_at = max(due_at, num_computed + self.config.window)
        self._go_on(tracked, due_at)

    def reported(self, report: Report) -> bool:
        """Learn the loss curve of a compression.

        Returns:
            Whether the request still is packed as the report says; if not, it came too late.
        """
        tracked = self.requests.get(report.request_id)
        if (
            tracked is None
            or not tracked.kept
            or (tracked.packed_slot, tracked.covered)
            != (report.state_slot, tracked.sizes.covered(report.num_tokens))
        ):
            return False
        tracked.curve = report.curve
        if tracked.context is not None:
            tracked.context.curve = report.curve
            for user in tracked.context.users & self.requests.keys():
                self.requests[user].curve = report.curve
        return True

    def spoiled(self, report: Report | Scored) -> set[str]:
        """Who else has the keys that a policy chose which failed: users of the context that they
        went into. Nobody takes it from now on."""
        for context in self.contexts.described:
            if (context.slot, context.owner) == (report.state_slot, report.request_id):
                users = set(context.users)
                self.contexts.retire(context)
                return users
        return set()

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
        for request_id, tracked in self.requests.items():
            if tracked.observe_slot is None:
                continue
            if num_computed.get(request_id, 0) >= tracked.due_at:
                yield tracked

    def _prepare(self, tracked: Tracked, due_at: int) -> None:
        """Observe a request from now on, and compress it at ``due_at`` tokens."""
        self.observers.observe(tracked)
        tracked.due_at = due_at

    def _go_on(self, tracked: Tracked, due_at: int) -> None:
        """Compress it at ``due_at`` tokens next; observed until then if its prefill is not over."""
        tracked.due_at = due_at
        if due_at > (tracked.sizes.context or 0):
            self._stop_computing(tracked)  # nobody waits for what will not be packed
        if not tracked.in_prefill:
            tracked.trigger = "decode"
            self.observers.stop(tracked)

    def _stop_computing(self, tracked: Tracked) -> None:
        """Let those go on who await the context that it computes."""
        if tracked.wanted is not None:
            self.contexts.stop(tracked.wanted, tracked.request_id)
            tracked.wanted = None

    def _stop_sharing(self, tracked: Tracked) -> None:
        self._stop_computing(tracked)
        if tracked.context is not None:
            self.contexts.leave(tracked.context, tracked.request_id)
            tracked.context = None
