# SPDX-License-Identifier: Apache-2.0
"""Who may start: slots, the reserve and the forecast, as conditions of vLLM's own allocation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.integration.compat.releases import hits_count_when_admitted
from kvcompress_vllm.integration.engine.groups import OtherGroups
from kvcompress_vllm.integration.engine.kv_cache import PRIVATE, budget_of
from kvcompress_vllm.integration.engine.replay import Replays
from kvcompress_vllm.integration.engine.sharing import Sharing
from kvcompress_vllm.integration.engine.unfinished import UnfinishedSegments
from kvcompress_vllm.integration.sizing import all_step_tokens, draft_tokens
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.reporting.metrics import Recorder
from kvcompress_vllm.scheduling import admission
from kvcompress_vllm.scheduling.contexts import Context
from kvcompress_vllm.scheduling.echo import EchoPlanner
from kvcompress_vllm.scheduling.need import blocks_needed
from kvcompress_vllm.scheduling.observation import first_observed
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.sizes import NEVER

MARGIN = 8
"""For every so many requests one block stays free: some compressions come late."""


class Admission:
    """Stands before two methods of a scheduler's KV cache manager.

    Args:
        scheduler: whose manager's ``allocate_slots`` and ``get_computed_blocks`` are replaced.
        planner: that of the scheduler.
        recorder: is told why a request had to wait.
        sharing: finds packed prefixes that requests share.
        replays: knows which requests repeat a context.
        others: cache groups that are not compressed.
        unfinished: segments in which a request may go on.
        echo: says how long hits may be where a policy reads echo scores; None: no policy does.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        planner: CompressionPlanner,
        recorder: Recorder,
        sharing: Sharing,
        replays: Replays,
        others: OtherGroups,
        unfinished: UnfinishedSegments,
        echo: EchoPlanner | None = None,
    ) -> None:
        self._scheduler, self._planner, self._recorder = scheduler, planner, recorder
        self._sharing, self._replays, self._others = sharing, replays, others
        self._unfinished, self._echo = unfinished, echo
        self._block_size = planner.block_size
        self._hit: tuple[str, Context] | None = None
        """What vLLM was told last that a request need not compute."""
        self._unscored: tuple[str, list[KVCacheBlock]] | None = None
        """What a request found last that it must compute anew, for the sake of scores."""
        self._manager = manager = scheduler.kv_cache_manager
        self._output_length = admission.OutputLength()
        self._does_not_fit: tuple[str, int] | None = None
        self._base_watermark = manager.watermark_blocks
        self._stock_allocate_slots = manager.allocate_slots
        scheduler.kv_cache_manager.allocate_slots = (  # type: ignore[method-assign]
            self.allocate_slots
        )
        self._stock_computed_blocks = manager.get_computed_blocks
        scheduler.kv_cache_manager.get_computed_blocks = (  # type: ignore[method-assign]
            self.get_computed_blocks
        )

    def finished(self, request: Request) -> None:
        """Learn from a finished request how long outputs are."""
        self._output_length.finished(request.num_output_tokens)

    def too_large(self, request: Request, budget: RequestBudget | None) -> str | None:
        """Why a request can never finish; the front end refuses such ones, unless passed by."""
        length = min(self._scheduler.max_model_len, request.num_tokens + request.max_tokens)
        drafts = draft_tokens(self._scheduler.vllm_config)
        sizes, window = self._planner.sizes(budget), self._planner.config.window
        needed = blocks_needed(sizes, window, length, drafts) + self._others.most(length)
        most = self._manager.block_pool.num_gpu_blocks - 1
        return None if needed <= most else f"it may need {needed} blocks of {most}"

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """vLLM's allocation, with slots and the reserve as further conditions of admission."""
        first = request.num_computed_tokens
        if request.status is RequestStatus.RUNNING:
            blocks = self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        else:
            blocks = self._admit(request, num_new_tokens, *args, **kwargs)
            first += kwargs.get("num_new_computed_tokens", 0)
        if blocks is not None and self._echo is not None and self._echo.blocks is not None:
            size, end = self._block_size, first + num_new_tokens
            # Whoever began a block has said so of it: a decoding request does once in a while.
            if -first % size < num_new_tokens:
                # Not once the step is planned: the next request may hit these blocks already.
                row = self._manager.get_blocks(request.request_id).blocks[self._others.index]
                ids = [block.block_id for block in row[first // size : -(-end // size)]]
                policy = self._planner.sizes(budget_of(request)).budget.policy
                self._echo.allocated(policy, ids, first, end)
        return blocks

    def _admit(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        planner, manager = self._planner, self._manager
        if request.request_id in self._replays:
            # Whose context it repeats waits for it and holds blocks: it needs no more conditions.
            manager.watermark_blocks = 0
            return self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        budget, context = budget_of(request), self.hit(request)
        if context is None and self._would_repeat_beside(request, budget):
            return None
        starting = planner.newcomers.starting("", request.num_tokens, budget, context)
        if not planner.newcomers.have_slots(starting):
            self._recorder.refused("slots")
            return None
        reserve = planner.newcomers.reserve(starting)
        if not self._fits(request, reserve, starting):
            self._recorder.refused("forecast")
            return None
        # vLLM skips its watermark when nothing runs: a lone prompt may take the whole pool, and
        # then stays uncompressed.
        manager.watermark_blocks = max(self._base_watermark, reserve)
        if context is not None or starting.due_at < request.num_tokens:
            kwargs["full_sequence_must_fit"] = False
        if context is not None:
            self._sharing.take(request.request_id, context)
        self._forget_unscored(request)
        blocks = self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is not None:
            wanted = self._sharing.wanted(request)
            planner.admit(request.request_id, request.num_tokens, budget, context, wanted)
            found = kwargs.get("num_new_computed_tokens", 0)
            self._unfinished.started(request.request_id)
            self._sharing.started(request, context, found)
            self._sharing.computed(request, request.num_computed_tokens + found + num_new_tokens)
        elif context is not None:
            self._sharing.leave(request.request_id)
        return blocks

    def _would_repeat_beside(self, request: Request, budget: RequestBudget | None) -> bool:
        """Whether a request would await a repetition beside another that does: each keeps blocks,
        and a place, that the other's may need. Asked here, too, as what a request was to take when
        the step began may be gone by now. A context that ends the prompt blocks nobody."""
        if not (self._planner.replays and self._sharing.names.repeats(request)):
            return False
        return (self._planner.sizes(budget).context or 0) < request.num_tokens

    def hit(self, request: Request) -> Context | None:
        """The context that a request takes which is about to start its prefill; None: none."""
        if self._hit is None or self._hit[0] != request.request_id:
            return None
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        return self._hit[1] if waits else None

    def get_computed_blocks(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int]:
        """vLLM's prefix cache lookup, except that what a compression observes is computed, and
        what has no echo scores where its policy reads them."""
        self._unfinished.forget()
        self._unscored = None
        if request.request_id in self._replays:
            self._hit = None
            context_row = self._replays.blocks(request)
            row = self._manager.create_kv_cache_blocks((context_row,))
            return row, len(context_row) * self._planner.block_size, 0
        blocks, num_tokens, boundary = self._stock_computed_blocks(request, *args, **kwargs)
        planner = self._planner
        context, self._hit = self._sharing.find(request), None
        if context is not None:
            self._hit = request.request_id, context
            tail = self._tail(request, context)
            usable = context.num_tokens + len(tail) * planner.block_size
            self._count_hit(request, usable - num_tokens)
            row = self._manager.create_kv_cache_blocks(([*self._sharing.row(context), *tail],))
            return row, usable, 0
        sizes = planner.sizes(budget_of(request))
        starting = planner.newcomers.starting("", request.num_tokens, sizes.budget)
        due_at = starting.due_at
        usable = 0 if hasattr(request, PRIVATE) else num_tokens
        if starting.starts_observed:
            first = first_observed(sizes.budget, due_at, planner.config.window)
            usable = min(usable, first // planner.block_size * planner.block_size)
        ours = list(blocks.blocks[self._others.index][: usable // planner.block_size])
        if (
            ours
            and self._echo is not None
            and due_at != NEVER
            and self._echo.reads(sizes.budget.policy)
        ):
            ours = self._scored(request, starting, 0, ours)
            usable = len(ours) * planner.block_size
        lost = num_tokens - usable
        found: list[Any] = list(blocks.blocks)
        if lost > 0 and self._others:
            hit, usable = self._others.hit(request, usable)
            found, lost = list(hit), num_tokens - usable
        found[self._others.index] = ours[: usable // planner.block_size]
        if lost > 0:
            self._count_hit(request, -lost)
        return self._manager.create_kv_cache_blocks(tuple(found)), usable, boundary

    def _tail(self, request: Request, context: Context) -> list[KVCacheBlock]:
        """What a request finds behind the context that it takes."""
        planner, end = self._planner, request.num_tokens - 1
        starting = planner.newcomers.starting("", request.num_tokens, budget_of(request), context)
        if starting.prefix is None:
            return []
        if starting.starts_observed:
            first = first_observed(starting.budget, starting.due_at, planner.config.window)
            end = min(end, first)
        tail = self._sharing.tails.found(request, context, end)
        if not starting.reads_echo:
            return tail
        return self._scored(request, starting, context.num_tokens, tail)

    def _count_hit(self, request: Request, more: int) -> None:
        """Correct what vLLM has counted of its prefix cache's hits by now, in tokens."""
        stats = self._manager.prefix_cache_stats
        if stats is None or hits_count_when_admitted():
            return
        if request.num_preemptions > 0:
            stats.preempted_hits += more
        else:
            stats.hits += more

    def _scored(
        self, request: Request, starting: Tracked, first: int, hit: Sequence[KVCacheBlock]
    ) -> list[KVCacheBlock]:
        """What of a hit from token ``first`` on was scored in whole segments, in the blocks in
        which it was; and what the request can go on from of the segment behind."""
        assert self._echo is not None and self._echo.blocks is not None
        pool = self._manager.block_pool.blocks
        found = self._echo.blocks.usable(
            [block.block_id for block in hit],
            lambda mine, theirs: pool[mine].block_hash == pool[theirs].block_hash,
        )
        whole = [pool[block] for block in found]
        begin = first + len(whole) * self._block_size
        usable = whole + self._unfinished.find(request, starting, begin, hit[len(whole) :])
        self._unscored = request.request_id, list(hit[len(usable) :])
        return usable

    def _forget_unscored(self, request: Request) -> None:
        """Have the prefix cache forget what a request that starts computes anew, with scores: it
        would go on offering the older blocks of the same tokens, for which the next one would have
        to do the same again."""
        if self._unscored is not None and self._unscored[0] == request.request_id:
            idle = {block.block_id for block in self._unscored[1] if block.ref_cnt == 0}
            self._manager.block_pool.evict_blocks(idle)
        self._unscored = None

    def _fits(self, request: Request, reserve: int, starting: Tracked) -> bool:
        """Whether the pool will hold the running requests and this one without preemption."""
        pool, planner = self._manager.block_pool, self._planner
        running = [r for r in self._scheduler.running if r.request_id not in self._replays]
        parts = [r for r in self._scheduler.running if r.request_id in self._replays]
        if not running:
            return True
        question = request.request_id, planner.newcomers.version
        if question == self._does_not_fit:
            return False  # nothing has changed since: the forecast would not, either
        count = len(running) + 1
        candidate = None if starting.context is None else starting
        found = [(r, planner.requests.get(r.request_id)) for r in running]
        found.append((request, candidate))
        if not (parts or self._others):
            most = self._grown(found) + reserve + count // MARGIN
            if most <= pool.get_num_free_blocks():
                return True  # even if nothing comes back
        loads = [self._load(r, tracked, count) for r, tracked in found]
        set_aside = reserve + len(loads) // MARGIN + sum(map(self._replays.own_blocks, parts))
        set_aside -= admission.counted_twice(
            (tracked, r.num_tokens, load) for (r, tracked), load in zip(found, loads, strict=True)
        )
        left = pool.num_gpu_blocks - set_aside
        fits = (
            admission.at_most_blocks(loads, planner.block_size) < left
            or admission.most_blocks(loads, planner.block_size) < left
        )
        self._does_not_fit = None if fits else question
        return fits

    def _grown(self, requests: Sequence[tuple[Request, Tracked | None]]) -> int:
        """Blocks that these will take at most of those that are free now."""
        blocks = 0
        for request, tracked in requests:
            end = request.num_tokens + self._left(request)
            blocks += (end - request.num_computed_tokens) // self._block_size + 2
            if tracked is not None and tracked.context is not None and tracked.due_at <= end:
                blocks += tracked.target().kept  # others may still use those that it leaves
        return blocks

    def _left(self, request: Request) -> int:
        return self._output_length.left(request.num_output_tokens, request.max_tokens)

    def _load(self, request: Request, tracked: Tracked | None, count: int) -> admission.Load:
        context = tracked.context if tracked is not None else None
        left = self._left(request)
        load = admission.load(
            self._planner.newcomers,
            tracked,
            max(request.num_computed_tokens, context.num_tokens if context else 0),
            request.num_tokens,
            left,
            all_step_tokens(self._scheduler.scheduler_config),
            budget_of(request),
            count,
        )
        later = self._others.decoding(request.num_tokens + left)
        return load._replace(
            prompt=load.prompt + self._others.most(request.num_tokens),
            start=load.start + later,
            most=load.most + later,
        )
