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
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records import budget
from kvcompress_vllm.records.budget import Wish
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.plan import Observation, Observed, Trigger
from kvcompress_vllm.records.report import Report, Scored
from kvcompress_vllm.scheduling.echo import Unscored
from kvcompress_vllm.scheduling.mass import ExpectedRatio, mass_blocks, mass_of, rounded_ratio

NEVER = 1 << 62
"""Token count at which nothing ever is due."""

LEAST_GAIN = 2
"""Blocks that an early compression must give back to be worth its while."""

LOSS_DIGITS = 4
"""Decimals of the loss per block that count; among equals, who gives back most comes first."""

MOST_REMEMBERED = 100_000
"""Sizes that are kept at hand; requests may come with any number of different wishes."""


@dataclass
class Tracked:
    """One compressible request, from admission on."""

    request_id: str
    state_slot: int
    due_at: int
    """Compressed once so many of its tokens are computed."""
    prefill_end: int = 0
    """Tokens that its prefill computes."""
    observe_slot: int | None = None
    """Held from shortly before a compression until it is carried out."""
    covered: int = 0
    """F, full blocks covered by compression so far."""
    kept: int = 0
    """C, blocks they are packed into; 0 until the first compression."""
    own: Wish | None = None
    """What the request asked for; None: the configured budget."""
    accumulated: int = 0
    """Tokens whose queries the running statistics count; a policy that judges by all queries."""
    known: int = 0
    """Blocks whose keys have running statistics."""
    counted: int = 0
    """Queries counted in them."""
    ratio: float | None = None
    """Of the compression that is under way, where the pool ran short; None: its usual budget."""
    trigger: Trigger = "decode"
    """Of the compression that comes next."""
    usual_due: int = NEVER
    """``due_at`` as it was before the pool ran short."""
    curve: LossCurve | None = None
    """Of its latest compression, once the worker has reported it."""
    scored_at: int = 0
    """``due_at`` for which its loss curve was asked for; a mass budget."""
    decided: int | None = None
    """C of the compression that comes next, once that curve was seen."""
    unscored: Unscored = field(default_factory=Unscored)
    """Where echo scores are stored: its keys without one."""


class CompressionPlanner:
    """Keeps the slots and the state of every compressible request.

    Args:
        config: the resolved options.
        block_size: tokens per block.
        state_slots: how many requests can be packed at once.
        observe_slots: how many requests can be observed at once.
        max_tokens: longest possible request, prompt and output.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        block_size: int,
        state_slots: int,
        observe_slots: int,
        max_tokens: int,
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.max_tokens = max_tokens
        self.requests: dict[str, Tracked] = {}
        self.version = 0
        """Changes whenever a request comes, goes or is packed for the first time."""
        self.observe_slots = observe_slots
        self._state_slots = list(range(state_slots - 1, -1, -1))
        self._observe_slots = list(range(observe_slots - 1, -1, -1))
        self._released: list[int] = []
        # Asked for every request on every step.
        self._kept: dict[tuple[int, float | None, Wish | None], int] = {}
        self._first_outgrown: dict[Wish | None, int] = {}
        self._expected = ExpectedRatio(config)
        if 0 < config.query_stride * config.window < block_size:
            raise ValueError(
                f"kv_compress: query_stride={config.query_stride} and window={config.window} are "
                f"too small: their product must reach the block size of {block_size} tokens"
            )
        peak = config.prefill_peak_tokens
        self.peak_blocks = None if peak is None else peak // block_size
        """Blocks that a request may hold during its prefill; None: all of them."""
        if self.peak_blocks is not None and self.peak_blocks // 2 < self.floor():
            raise ValueError(
                f"kv_compress: prefill_peak_tokens={peak} is too small: half of it must hold the "
                f"{self.floor() * block_size} tokens that every head keeps (sinks, recent, "
                "min_tokens_per_head)"
            )

    def packed_size(
        self, num_tokens: int, own: Wish | None = None, ratio: float | None = None
    ) -> tuple[int, int]:
        """(F, C) of a compression at ``num_tokens`` tokens; C < F if there is anything to gain.

        Args:
            own: what the request asked for.
            ratio: compress at least so much.
        """
        covered = num_tokens // self.block_size
        if num_tokens < self.config.min_prompt_tokens:
            return covered, covered
        key = covered, ratio, own
        if key not in self._kept:
            if len(self._kept) > MOST_REMEMBERED:
                self._kept.clear()
            config = self.config.with_policy(own.policy if own else None)
            self._kept[key] = budget.packed_blocks(
                config, num_tokens, covered, self.block_size, ratio, own
            )
        return covered, self._kept[key]

    def outgrown_at(self, covered: int = 0, kept: int = 0, own: Wish | None = None) -> int:
        """Tokens at which a request has ``interval`` blocks more than its budget; may be NEVER.

        Args:
            covered: F so far.
            kept: C so far.
            own: what the request asked for.
        """
        config, size = self.config, self.block_size
        if not config.decode:
            return NEVER
        # From the shortest compressible request on, the excess grows by at most one block per
        # block, so these strides cannot miss the place.
        full = max(covered, -(-config.min_prompt_tokens // size))
        while full * size <= self.max_tokens:
            excess = kept + full - covered - self.packed_size(full * size, own)[1]
            if excess >= config.interval:
                return full * size
            full += config.interval - excess
        return NEVER

    def floor(self, covered: int = 0, own: Wish | None = None) -> int:
        """Pages that every head of a request keeps of ``covered`` blocks."""
        config = self.config.with_policy(own.policy if own else None)
        return budget.floor_pages(config, self.block_size, covered, own)

    def target(self, tracked: Tracked) -> tuple[int, int]:
        """(F, C) of the compression that a request awaits; with a mass budget as expected of it,
        until known."""
        if tracked.decided is not None:
            return tracked.due_at // self.block_size, tracked.decided
        return self._size_at(tracked.due_at, tracked.prefill_end, tracked.own, tracked.ratio)

    def _size_at(
        self, due_at: int, prefill_end: int, own: Wish | None, ratio: float | None = None
    ) -> tuple[int, int]:
        """As ``packed_size``; for one that interrupts the prefill, within half of the peak."""
        covered, kept = self.packed_size(due_at, own, ratio)
        if self.peak_blocks is None or due_at >= prefill_end:
            return covered, kept
        if own is None or own.context_tokens != due_at:
            # What the whole prompt may keep need not go yet.
            kept = max(kept, self.packed_size(prefill_end, own, ratio)[1])
        return covered, min(
            covered, max(min(kept, self.peak_blocks // 2), self.floor(covered, own))
        )

    def first_due(self, num_tokens: int, own: Wish | None = None) -> int:
        """Tokens at which a request whose prefill computes ``num_tokens`` is compressed first."""
        interrupted_at = self._interrupted_at(0, 0, 0, num_tokens, own)
        if interrupted_at < num_tokens:
            return interrupted_at
        covered, kept = self.packed_size(num_tokens, own)
        return num_tokens if kept < covered else self._first_due(own)

    def chunk(
        self,
        request_id: str,
        first_token: int,
        num_tokens: int,
        prefill_end: int = 0,
        own: Wish | None = None,
    ) -> int:
        """How many of ``num_tokens`` tokens from position ``first_token`` on the next step may
        compute: none beyond a compression that is due in the middle of a prefill, and no more than
        can be observed. May be 0 where only whole blocks will do.

        Args:
            prefill_end: tokens of a prefill that is not admitted yet.
            own: what that request asked for.
        """
        tracked = self.requests.get(request_id)
        if tracked is None:
            due_at = self.first_due(prefill_end, own)
        elif tracked.observe_slot is not None:
            due_at, prefill_end, own = tracked.due_at, tracked.prefill_end, tracked.own
        else:
            return num_tokens
        if first_token >= due_at or due_at > prefill_end:
            return num_tokens
        end = min(first_token + num_tokens, due_at)
        history = self.history(own)
        if history is not None:
            observed_from = due_at - history
            if first_token < observed_from:
                end = min(end, -(-observed_from // self.block_size) * self.block_size)
            else:
                end = min(end, first_token + self.config.window * self.config.query_stride)
            if end < due_at:  # statistics are of whole blocks
                end -= end % self.block_size
        return max(0, end - first_token)

    def history(self, own: Wish | None) -> int | None:
        """Tokens before a prompt's compression whose queries are observed, for a policy that judges
        by all queries; None: only those of the window count."""
        config = self.config
        if not config.query_stride:
            return None  # asked for every request on every step
        found = policies.find(own.policy if own is not None and own.policy else config.policy)
        if not found.observes_all:
            return None
        return NEVER if found.history is None else found.history

    def observed(self, tracked: Tracked, num_tokens: int) -> Observed | None:
        """What a request's observation slot holds once ``num_tokens`` tokens are computed; None:
        the last ``window`` queries, and there are no running statistics."""
        history = self.history(tracked.own)
        if history is None:
            return None
        if tracked.due_at > tracked.prefill_end:
            first, stride = max(tracked.accumulated, num_tokens - self.config.window), 1
        else:
            first, stride = self._observed_from(tracked, history), self.config.query_stride
        count = max(0, -(-(num_tokens - first) // stride))
        return Observed(min(count, self.config.window), stride, tracked.known, tracked.counted)

    def _observed_from(self, tracked: Tracked, history: int) -> int:
        return max(tracked.accumulated, tracked.due_at - history)

    def accumulate(self, num_computed: Mapping[str, int]) -> Iterator[tuple[Tracked, Observed]]:
        """Requests in whose prefill something was observed since the last call, and what; their
        compression is not yet due. ``accumulated`` and the like are of after it.

        Args:
            num_computed: computed tokens of the running requests.
        """
        for tracked in self.requests.values():
            computed = num_computed.get(tracked.request_id, 0)
            if (
                tracked.observe_slot is None
                or not tracked.accumulated < computed < tracked.due_at <= tracked.prefill_end
            ):
                continue
            observed = self.observed(tracked, computed)
            if observed is None or not observed.num_queries:
                continue
            self._count(tracked, computed, observed)
            yield tracked, observed

    def _count(self, tracked: Tracked, num_tokens: int, observed: Observed | None) -> None:
        tracked.accumulated, tracked.known = num_tokens, num_tokens // self.block_size
        tracked.counted += observed.num_queries if observed is not None else 0

    def bounds_peak(self, num_tokens: int) -> bool:
        """Whether a prefill of ``num_tokens`` tokens never holds them all at once."""
        return self.peak_blocks is not None and num_tokens > self.peak_blocks * self.block_size

    def can_admit(self, num_tokens: int, own: Wish | None = None) -> bool:
        """Whether the slots allow a request of ``num_tokens`` tokens to start its prefill now."""
        due_at = self.first_due(num_tokens, own)
        if due_at <= num_tokens:
            return bool(self._state_slots and self._observe_slots)
        return bool(self._state_slots) or due_at == NEVER

    def admit(self, request_id: str, num_tokens: int, own: Wish | None = None) -> None:
        """Start to track a request; one that will never be compressed is not tracked.

        Args:
            num_tokens: tokens that its prefill computes: the prompt, and after a preemption the
                output so far.
            own: what the request asked for.

        Raises:
            RuntimeError: it is tracked already, or there is no slot (ask ``can_admit`` first).
        """
        self.version += 1
        due_at = self.first_due(num_tokens, own)
        if due_at == NEVER:
            return
        if request_id in self.requests or not self.can_admit(num_tokens, own):
            raise RuntimeError(
                f"kv_compress: cannot admit {request_id}: tracked={request_id in self.requests}, "
                f"{len(self._state_slots)} state and {len(self._observe_slots)} observation slots"
            )
        tracked = Tracked(request_id, self._state_slots.pop(), due_at, num_tokens, own=own)
        if due_at <= num_tokens:
            tracked.observe_slot = self._observe_slots.pop()
            tracked.trigger = "prefill"
        self.requests[request_id] = tracked

    def reserve(self, num_tokens: int = 0, own: Wish | None = None) -> int:
        """Blocks to keep free so that any one request awaiting compression can be packed.

        Args:
            num_tokens: prefill length of a request about to be admitted, 0 for none.
            own: what that request asked for.
        """
        waiting = [self.target(t)[1] for t in self.requests.values() if t.observe_slot is not None]
        due_at = self.first_due(num_tokens, own) if num_tokens else NEVER
        if due_at <= num_tokens:
            waiting.append(self._size_at(due_at, num_tokens, own)[1])
        return max(waiting, default=0)

    def watch(self, num_computed: Mapping[str, int]) -> None:
        """Give observation slots to decoding requests that will soon have outgrown their budget.

        Args:
            num_computed: computed tokens of the running requests.
        """
        if not self._observe_slots:
            return
        window = self.config.window
        near = [
            (tracked.due_at - computed, computed, tracked)
            for tracked in self.requests.values()
            if tracked.observe_slot is None
            and (computed := num_computed.get(tracked.request_id, 0)) >= tracked.due_at - window
        ]
        # Who is overdue longest gives back most.
        near.sort(key=lambda item: item[0])
        for _, computed, tracked in near[: len(self._observe_slots)]:
            # Late (no slot was free, or a prefill passed the mark): a whole window from now.
            self._prepare(tracked, max(tracked.due_at, computed + window))

    def press(self, num_computed: Mapping[str, int], num_free: int) -> None:
        """When the pool runs short, prepare early compressions, lowest loss per block first.

        Short means: fewer free blocks than the running requests will take until a compression that
        is prepared now is carried out, and than its copy takes.

        Args:
            num_computed: computed tokens of the running requests.
            num_free: free blocks of the pool.
        """
        window, size = self.config.window, self.block_size
        most = len(num_computed) * ((window + size) // size) + (self.max_tokens + window) // size
        if num_free >= most:
            return  # more than the sums below can come to
        growth = sum((n + window) // size - (n - 1) // size for n in num_computed.values())
        copy = max(
            (
                self.packed_size(num_computed.get(t.request_id, 0) + window, t.own)[1]
                for t in self.requests.values()
            ),
            default=0,
        )
        missing = growth + max(copy, self.reserve()) - num_free
        missing -= sum(
            _given_back(t, *self.target(t))
            for t in self.requests.values()
            if t.observe_slot is not None
        )
        beyond = self.config.max_ratio
        for ratio in [None] if beyond is None else [None, beyond]:
            if missing <= 0 or not self._observe_slots:
                return
            gains = [
                (self._gain(t, at, ratio), at, t)
                for t in self.requests.values()
                if t.observe_slot is None
                and (at := num_computed.get(t.request_id, 0) + window) > window
            ]
            gains = [item for item in gains if item[0] >= LEAST_GAIN]
            best = max((gain for gain, _, _ in gains), default=0)
            # By loss only among gains of one magnitude: a slot is taken for a whole window, so one
            # that is spent on a small gain leaves the pool short, and a preemption loses most.
            gains.sort(
                key=lambda item: (
                    (best // item[0]).bit_length(),
                    _loss_per_block(item[2], item[1] // size, item[0]),
                    -item[0],
                )
            )
            for gain, due_at, tracked in gains[: len(self._observe_slots)]:
                if missing <= 0:
                    return
                tracked.usual_due = tracked.due_at
                self._prepare(tracked, due_at)
                tracked.ratio, tracked.trigger = ratio, "pressure"
                missing -= gain

    def _prepare(self, tracked: Tracked, due_at: int) -> None:
        """Observe a request from now on, and compress it at ``due_at`` tokens."""
        tracked.observe_slot = self._observe_slots.pop()
        tracked.due_at = due_at

    def _gain(self, tracked: Tracked, num_tokens: int, ratio: float | None) -> int:
        """Blocks that a compression at ``num_tokens`` tokens would give back."""
        return _given_back(tracked, *self.packed_size(num_tokens, tracked.own, ratio))

    def observe(self, request_id: str, first_token: int, num_tokens: int) -> Observation | None:
        """What to observe of a request's ``num_tokens`` tokens from position ``first_token`` on."""
        tracked = self.requests.get(request_id)
        if tracked is None or tracked.observe_slot is None:
            return None
        observe_from, stride = max(0, tracked.due_at - self.config.window), 1
        history = self.history(tracked.own)
        if history is not None and tracked.due_at <= tracked.prefill_end:
            observe_from = max(0, self._observed_from(tracked, history))
            stride = self.config.query_stride
        if first_token >= tracked.due_at or first_token + num_tokens <= observe_from:
            return None
        return Observation(request_id, tracked.observe_slot, first_token, observe_from, stride)

    def due(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests whose observation is complete, oldest first.

        Args:
            num_computed: computed tokens of the running requests.
        """
        return [
            tracked
            for request_id, tracked in self.requests.items()
            if tracked.observe_slot is not None
            and num_computed.get(request_id, 0) >= tracked.due_at
            and not _awaits_curve(tracked)
        ]

    def sized(self, own: Wish | None) -> Wish | None:
        """What a request asked for, with the ratio that is expected of a mass, and a policy whose
        scores have one. All methods that take ``own`` take it so."""
        mass = mass_of(self.config, own)
        if mass is None:
            return own
        own = own or Wish()
        policy = own.policy
        if not policies.find(policy or self.config.policy).additive:
            policy = policies.default(mass=True)
        return own._replace(mass=mass, ratio=self._expected.ratio, policy=policy)

    def to_score(self, num_computed: Mapping[str, int]) -> list[Tracked]:
        """Requests with a mass budget whose observation is complete; each once per compression.

        Args:
            num_computed: computed tokens of the running requests.
        """
        ready = [
            tracked
            for request_id, tracked in self.requests.items()
            if _awaits_curve(tracked)
            and tracked.scored_at != tracked.due_at
            and num_computed.get(request_id, 0) >= tracked.due_at
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
            or not _awaits_curve(tracked)
            or (tracked.state_slot, tracked.due_at) != (scored.state_slot, scored.num_tokens)
        ):
            return
        own, covered = tracked.own, tracked.due_at // self.block_size
        assert own is not None and own.mass is not None
        config = self.config.with_policy(own.policy)
        fewest = budget.fewest_blocks(config, self.block_size, covered, own)
        kept = mass_blocks(config, scored.curve, own.mass, covered, fewest)
        self._expected.learn(covered, kept)
        self.version += 1
        tracked.own = own._replace(ratio=rounded_ratio(covered / kept))
        if kept < scored.curve.blocks[-1]:
            tracked.decided = kept
            return
        tracked.trigger = "decode"
        tracked.due_at = self._after_interval(tracked.due_at)
        assert tracked.observe_slot is not None
        self._observe_slots.append(tracked.observe_slot)
        tracked.observe_slot = None

    def interval(self, num_requests: int) -> int:
        """Blocks by which so many generations outgrow their budgets before they are compressed.

        More than configured where the observation slots do not go round: each is taken for
        ``window`` tokens at a time.
        """
        turn = -(-num_requests * self.config.window // (self.observe_slots * self.block_size))
        return max(self.config.interval, turn)

    def _after_interval(self, num_tokens: int) -> int:
        """Tokens at which a request has ``interval`` blocks more; NEVER where ``decode`` is off."""
        if not self.config.decode:
            return NEVER
        return num_tokens + self.config.interval * self.block_size

    def compressed(self, request_id: str) -> None:
        """Note that a due request is packed as of this step; its observation slot is free.

        Raises:
            RuntimeError: the request was not observed.
        """
        tracked = self.requests[request_id]
        if tracked.observe_slot is None:
            raise RuntimeError(f"kv_compress: {request_id} is compressed without observation")
        self.version += not tracked.kept
        tracked.covered, tracked.kept = self.target(tracked)
        tracked.unscored.packed(tracked.covered * self.block_size)
        tracked.curve = tracked.decided = tracked.ratio = None
        self._count(tracked, tracked.due_at, self.observed(tracked, tracked.due_at))
        now, tracked.due_at = tracked.due_at, self._next_due(tracked)
        if tracked.own is not None and tracked.own.mass is not None and now >= tracked.prefill_end:
            # Its ratio is an expectation; it may be off by more than the interval.
            tracked.due_at = max(tracked.due_at, self._after_interval(now))
        if tracked.due_at <= tracked.prefill_end:
            return  # its prefill goes on, observed
        tracked.trigger = "decode"
        self._observe_slots.append(tracked.observe_slot)
        tracked.observe_slot = None

    def reported(self, report: Report) -> bool:
        """Learn the loss curve of a compression.

        Returns:
            Whether the request still is packed as the report says; if not, it came too late.
        """
        tracked = self.requests.get(report.request_id)
        if (
            tracked is None
            or not tracked.kept
            or (tracked.state_slot, tracked.covered)
            != (report.state_slot, report.num_tokens // self.block_size)
        ):
            return False
        tracked.curve = report.curve
        return True

    def release(self, request_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted; unknown ones are fine."""
        self.version += 1
        tracked = self.requests.pop(request_id, None)
        if tracked is None:
            return
        if tracked.observe_slot is not None:
            self._observe_slots.append(tracked.observe_slot)
        self._state_slots.append(tracked.state_slot)
        self._released.append(tracked.state_slot)

    def observe_slots_used(self) -> int:
        """Observation slots that are taken now."""
        return self.observe_slots - len(self._observe_slots)

    def take_released(self) -> list[int]:
        """State slots released since the last call."""
        released, self._released = self._released, []
        return released

    def packed(self) -> Iterable[Tracked]:
        """Requests that are packed now."""
        return (t for t in self.requests.values() if t.kept)

    def _interrupted_at(
        self, covered: int, kept: int, now: int, prefill_end: int, own: Wish | None
    ) -> int:
        """Tokens at which a compression interrupts a prefill after ``now`` tokens; may be NEVER."""
        marks = []
        context = own.context_tokens if own is not None else None
        if context is not None:
            marks.append(context)
        whole, final = self.packed_size(prefill_end, own)
        if self.peak_blocks is not None and final < whole:
            marks.append((self.peak_blocks + covered - kept) * self.block_size)
        return min(
            (
                mark
                for mark in marks
                if now < mark < prefill_end
                and self._size_at(mark, prefill_end, own)[1]
                < mark // self.block_size - covered + kept
            ),
            default=NEVER,
        )

    def _next_due(self, tracked: Tracked) -> int:
        """When a request that was just compressed is compressed again."""
        covered, kept, own = tracked.covered, tracked.kept, tracked.own
        now, end = tracked.due_at, tracked.prefill_end
        if now < end:
            interrupted_at = self._interrupted_at(covered, kept, now, end, own)
            if interrupted_at < end:
                return interrupted_at
            if self._gain(tracked, end, None) >= self.config.interval:
                return end
        return self.outgrown_at(covered, kept, own)

    def _first_due(self, own: Wish | None) -> int:
        """``outgrown_at`` of a request that is not packed."""
        if len(self._first_outgrown) > MOST_REMEMBERED:
            self._first_outgrown.clear()
        if own not in self._first_outgrown:
            self._first_outgrown[own] = self.outgrown_at(own=own)
        return self._first_outgrown[own]


def _loss_per_block(tracked: Tracked, covered: int, gain: int) -> float:
    """Share of its score mass that a request would lose per block given back.

    Read off the curve of its latest compression, as if what it decoded since were worth as much as
    what it kept then. A request that was never compressed has no curve and has lost nothing: its
    cheapest blocks are taken to be free. One whose curve is still on its way comes last.

    Args:
        covered: F of the compression.
        gain: blocks that it gives back.
    """
    if tracked.curve is None:
        return math.inf if tracked.kept else 0.0
    held = tracked.kept + covered - tracked.covered
    kept = tracked.kept * (held - gain) / held
    lost = tracked.curve.lost_at(kept) - tracked.curve.lost_at(tracked.kept)
    return round(lost / gain, LOSS_DIGITS)


def _awaits_curve(tracked: Tracked) -> bool:
    """Whether C can only be told from a loss curve. What interrupts a prefill, or goes beyond the
    budget because the pool runs short, cannot wait for one."""
    return (
        tracked.observe_slot is not None
        and tracked.decided is None
        and tracked.own is not None
        and tracked.own.mass is not None
        and tracked.ratio is None
        and tracked.due_at >= tracked.prefill_end
    )


def _given_back(tracked: Tracked, covered: int, kept: int) -> int:
    """Blocks that compressing to (F, C) gives back."""
    return covered - tracked.covered + tracked.kept - kept


def most_held(
    config: KVCompressConfig, num_tokens: int, block_size: int, own: Wish | None = None
) -> int:
    """Blocks that a request of up to ``num_tokens`` tokens can hold at most, its copy included.

    Less than all only where prompts are bounded by ``prefill_peak_tokens`` and generations by
    ``decode``.

    Args:
        own: what the request asked for.
    """
    covered = num_tokens // block_size
    everything = -(-num_tokens // block_size)
    kept = budget.packed_blocks(config, num_tokens, covered, block_size, own=own)
    if config.prefill_peak_tokens is None or not config.decode or kept == covered:
        return everything
    peak = config.prefill_peak_tokens // block_size
    observed = -(-config.window // block_size)
    return min(
        everything, max(peak + peak // 2, 2 * kept + config.interval + observed) + SLACK_BLOCKS
    )


SLACK_BLOCKS = 2
"""For ends of tokens that do not fill a block."""


def num_observe_slots(
    config: KVCompressConfig,
    max_batched_tokens: int,
    max_requests: int,
    cache_tokens: int,
    group: int,
) -> int:
    """Observation slots of an engine; scheduler and workers compute the same number.

    At most ``max_batched_tokens / min_prompt_tokens`` prompts can end in one step, and as many may
    still wait for their packed blocks; requests beyond that wait their turn. The ring must not eat
    what compression saves: it takes at most a hundredth of the KV cache.

    Args:
        max_batched_tokens: tokens in a step.
        max_requests: requests in a step.
        cache_tokens: tokens that the KV cache holds.
        group: G, query heads per KV head.
    """
    per_step = -(-max_batched_tokens // config.min_prompt_tokens) + 1
    # A slot holds window * G queries per KV head; a token of the cache is a K and a V vector.
    affordable = cache_tokens * 2 // (RING_SHARE * config.window * group)
    return max(FEWEST_OBSERVE_SLOTS, min(2 * per_step, max_requests, affordable))


RING_SHARE = 100
"""The ring takes at most one in so many bytes of the KV cache."""

FEWEST_OBSERVE_SLOTS = 4
"""With fewer, prompts would wait for each other even on a tiny cache."""
