# SPDX-License-Identifier: Apache-2.0
"""The plan of a step: what the planner wants, with the blocks that vLLM's pool has for it.

``compression/step.py`` is what a worker does with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from kvcompress_vllm.integration.engine.groups import OtherGroups
from kvcompress_vllm.integration.engine.kv_cache import KVCompressManager, budget_of
from kvcompress_vllm.integration.engine.replay import Replays
from kvcompress_vllm.integration.engine.sharing import Sharing
from kvcompress_vllm.integration.engine.unfinished import UnfinishedSegments
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import (
    Accumulation,
    Compression,
    Heard,
    PackedRow,
    Scoring,
    StepPlan,
)
from kvcompress_vllm.scheduling.echo import EchoPlanner
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.segments import SEGMENT


class StepBuilder:
    """Builds the :class:`StepPlan` of every step, in two parts: :meth:`begin` before vLLM schedules
    it, so that what compressions give back can be handed out in the same step, and
    :meth:`complete` once it is known who computes what.

    Args:
        planner: says who is observed and compressed.
        manager: allocates the packed blocks.
        sharing: offers what is packed for others as well.
        replays: knows which requests repeat a context.
        unfinished: knows whose queries are kept, and who takes them over.
        echo: says which tokens get echo scores; None: no policy reads any.
        group: whose blocks ``manager`` allocates.
        others: take blocks of the same pool.

    Attributes:
        waits: whether the pool had no room for a compression that was due, in the step that was
            begun last.
    """

    def __init__(
        self,
        planner: CompressionPlanner,
        manager: KVCompressManager,
        sharing: Sharing,
        replays: Replays,
        unfinished: UnfinishedSegments,
        echo: EchoPlanner | None,
        group: CacheGroup,
        others: OtherGroups,
    ) -> None:
        self._planner, self._manager, self._echo = planner, manager, echo
        self._sharing, self._replays, self._others = sharing, replays, others
        self._unfinished = unfinished
        self._group = group.index
        self.waits = False

    def begin(self, computed: Mapping[str, int]) -> StepPlan:
        """What is done before the step's forward. Packs what is due.

        Args:
            computed: computed tokens of every running request.
        """
        plan = StepPlan(
            saved=self._unfinished.take_saved(),
            accumulations=self._accumulate(computed),
            heard=self._heard(computed),
            compressions=self._compress_due(computed),
            scorings=self._score_due(computed),
        )
        plan.released = self._planner.contexts.take_released()
        return plan

    def complete(
        self,
        plan: StepPlan,
        scheduled: Mapping[str, int],
        drafted: Mapping[str, Sequence[int]],
        requests: Mapping[str, Request],
        check_integrity: bool,
    ) -> None:
        """Leave out of ``plan`` whoever was preempted since, and add what the forward does.

        Args:
            scheduled: tokens that each request computes in this step.
            drafted: those of them that may be rejected.
            requests: all of the scheduler; the step's tokens count as computed.
            check_integrity: whether the workers shall compare what they know.
        """
        planner, manager = self._planner, self._manager
        for item in plan.compressions:
            if item.request_id not in manager.packed:
                planner.contexts.never_packed(item.state_slot)
        plan.released += planner.take_released()
        plan.dropped = planner.take_dropped()
        plan.loaded = self._unfinished.take_loaded()
        # Who is gone has no state slot by the time that a worker accumulates: if it was packed, its
        # row could not be read.
        plan.accumulations = [a for a in plan.accumulations if a.request_id in planner.requests]
        plan.heard = [item for item in plan.heard if item.request_id in planner.requests]
        for loser, slot, begin, end in planner.observers.take_lost():
            if planner.requests.get(loser.request_id) is loser:
                plan.heard.append(self._of_slot(loser.request_id, slot, begin, end))
        plan.scorings = [c for c in plan.scorings if c.request_id in planner.requests]
        # A request that was compressed and then preempted in the same step owns nothing.
        plan.compressions = [c for c in plan.compressions if c.request_id in manager.packed]
        parts, in_flight = self._replays.parts, bool(planner.unverified)
        for request_id, num_tokens in scheduled.items():
            request = requests[request_id]
            first_token = request.num_computed_tokens - num_tokens
            if request_id in parts:
                plan.replays += self._replays.computes(request_id, first_token, num_tokens)
                continue
            tracked = planner.requests.get(request_id)
            if tracked is not None and (
                first_token < tracked.prefill_end
                or tracked.observe_slot is not None
                or tracked.listen_slot is not None
            ):  # of most there is nothing to observe while they decode
                for observation in planner.observe(tracked, first_token, num_tokens):
                    if in_flight:
                        late = planner.unverified[request_id]
                        observation = observation._replace(unverified=late)
                    plan.observations.append(observation)
            if self._echo is not None:
                # A generated token, and what was drafted behind it, are no segment.
                decodes = num_tokens == 1 or request_id in drafted
                end = first_token + num_tokens
                if tracked is not None and first_token < tracked.heard_until:
                    heard = min(end, tracked.heard_until)
                    tracked.unscored.computed(first_token, heard, scored=False)
                    if heard < end:  # the segment is complete, and will be scored before all else
                        tracked.echoes(heard - SEGMENT, heard)
                    first_token = heard
                stop = end
                if tracked is not None and not decodes:
                    stop = max(first_token, min(end, planner.observers.hears_from(tracked)))
                scored = not decodes and self._score(plan, request, first_token, stop, end)
                if tracked is not None and first_token < end:
                    tracked.unscored.computed(first_token, stop, scored)
                    if stop < end:
                        tracked.unscored.computed(stop, end, scored=False)
                    if tracked.echoed is None:
                        tracked.echoed = first_token  # what it found has scores of whole segments
                    if scored:
                        tracked.echoes(first_token, stop)
            if num_tokens > 1 and request_id in manager.packed:
                plan.packed_prefills.append(request_id)
        if check_integrity:
            plan.expected = [
                PackedRow(
                    t.request_id,
                    t.state_slot,
                    t.covered,
                    manager.row(t.request_id, t.kept),
                    self._group,
                )
                for t in planner.packed()
                if t.context is None
            ]
            plan.expected += [
                PackedRow(c.owner, c.slot, c.packing.covered, list(c.blocks), self._group)
                for c in planner.contexts.described
            ]

    def _accumulate(self, computed: Mapping[str, int]) -> list[Accumulation]:
        """What was observed in chunks of prefills since the last step."""
        return [
            Accumulation(
                *self._candidates(tracked, tracked.state_slot, tracked.accumulated, tracked.known),
                group=self._group,
                policy=tracked.budget.policy,
                observed=observed,
            )
            for tracked, observed in self._planner.accumulate(computed)
        ]

    def _heard(self, computed: Mapping[str, int]) -> list[Heard]:
        """What was decoded with an observation slot since the last step, in whole segments."""
        found = []
        for tracked, slot, begin, end in self._planner.observers.heard(computed):
            item = self._of_slot(tracked.request_id, slot, begin, end)
            found.append(item)
            if self._echo is not None and end - begin == SEGMENT:
                # As if it had been read in a prompt: others find it so behind its context.
                blocks = item.blocks[begin // self._manager.block_size :]
                self._echo.allocated(tracked.budget.policy, blocks, begin, end)
        return found

    def _of_slot(self, request_id: str, slot: int, begin: int, end: int) -> Heard:
        row = self._manager.row(request_id, -(-end // self._manager.block_size))
        return Heard(request_id, slot, begin, end, row)

    def _compress_due(self, computed: Mapping[str, int]) -> list[Compression]:
        """Pack what is due as far as the pool allows; the rest waits for a later step."""
        planner, manager = self._planner, self._manager
        compressions: list[Compression] = []
        freed: list[KVCacheBlock] = []
        replaced: list[KVCacheBlock] = []
        self.waits = False
        planner.generations.watch(computed)
        if planner.config.on_pressure:
            taken = self._others.growth(computed, planner.config.window)
            planner.generations.press(computed, manager.block_pool.get_num_free_blocks() - taken)
        for tracked in planner.due(computed):
            num_tokens, packing = tracked.due_at, tracked.target()
            if manager.block_pool.get_num_free_blocks() < packing.kept:
                self.waits = True
                continue  # a smaller one may fit, and makes room
            if tracked.sizes.stride:
                key = self._sharing.names.due(tracked)
                planner.at_mark(tracked, computed[tracked.request_id], key)
            context = planner.new_context(tracked)
            slot = context.slot if context is not None else tracked.state_slot
            candidates = self._candidates(tracked, slot, num_tokens, packing.covered)
            new, old = manager.pack(tracked.request_id, packing)
            if context is not None:
                self._sharing.register(context, new)
            compressions.append(
                Compression(
                    *candidates,
                    new,
                    old_state_slot=tracked.packed_slot,
                    group=self._group,
                    policy=tracked.budget.policy,
                    observed=planner.observed(tracked, num_tokens),
                    floor_pages=tracked.floor(packing.covered),
                    protect=tracked.protect(packing.covered),
                    trigger=tracked.trigger,
                    unscored=tracked.unscored.before(packing.covered * manager.block_size),
                    replayed=tracked.replayed and num_tokens == tracked.sizes.context,
                )
            )
            freed += old
            if context is not None:
                # Not the context that it goes on from: others may do so, too.
                replaced += old[tracked.kept if tracked.context is not None else 0 :]
            planner.compressed(tracked.request_id, computed[tracked.request_id], context)
        planner.generations.listen(computed)
        # Last blocks first, so that prefix caching loses the ends of prompts before their starts.
        manager.block_pool.free_blocks(reversed(freed))
        self._sharing.replaced(replaced)
        return compressions

    def _score_due(self, computed: Mapping[str, int]) -> list[Scoring]:
        """Have the worker score the requests whose mass budget needs a loss curve."""
        planner = self._planner
        scorings = []
        for tracked in planner.to_score(computed):
            packing = tracked.target()
            scorings.append(
                Scoring(
                    *self._candidates(tracked, tracked.state_slot, tracked.due_at, packing.covered),
                    packing.kept,
                    old_state_slot=tracked.packed_slot,
                    group=self._group,
                    policy=tracked.budget.policy,
                    observed=planner.observed(tracked, tracked.due_at),
                    floor_pages=tracked.floor(packing.covered),
                    protect=tracked.protect(packing.covered),
                    unscored=tracked.unscored.before(packing.covered * planner.block_size),
                    replayed=tracked.replayed and tracked.due_at == tracked.sizes.context,
                )
            )
        return scorings

    def _candidates(
        self, tracked: Tracked, state_slot: int, num_tokens: int, covered: int
    ) -> tuple[str, int, int, int, int, int, int, list[int]]:
        """Whose keys, of the first ``covered`` blocks, and which slot will describe them: the first
        fields of all records."""
        assert tracked.observe_slot is not None
        manager = self._manager
        row = manager.row(tracked.request_id, -(-num_tokens // manager.block_size))
        slots = state_slot, tracked.observe_slot
        return tracked.request_id, *slots, num_tokens, *tracked.packing, covered, row

    def _score(self, plan: StepPlan, request: Request, first: int, stop: int, end: int) -> bool:
        """Have tokens ``[first, stop)`` of a prefill scored, of a step that computes those up to
        ``end``; False: nobody reads that."""
        assert self._echo is not None
        policy = self._planner.sizes(budget_of(request)).budget.policy
        span = self._echo.span(request.request_id, policy, first, stop, end - stop)
        if span is not None:
            plan.echoes.append(span)
        return span is not None
