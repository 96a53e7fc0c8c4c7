# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with compression: plans it, accounts for it, and sends it with the step.

The scheduler decides how many blocks a request gives back, a plain integer that needs no feedback,
so the accounting is exact with async scheduling and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.cache import integrity
from kvcompress_vllm.config.rules import printable
from kvcompress_vllm.integration.engine.kv_cache import KVCompressManager
from kvcompress_vllm.integration.frontend.requests import request_wish
from kvcompress_vllm.integration.frontend.stats import KVCompressSchedulerStats
from kvcompress_vllm.integration.frontend.usage import send
from kvcompress_vllm.integration.sizing import observe_slots, step_tokens
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.integration.worker.reports import reports_of
from kvcompress_vllm.records.budget import Wish
from kvcompress_vllm.records.plan import Compression, Observed, PackedRow, StepPlan
from kvcompress_vllm.records.report import Scored
from kvcompress_vllm.reporting.digest import Digest
from kvcompress_vllm.reporting.metrics import Occupancy, Recorder
from kvcompress_vllm.reporting.shortage import Shortage
from kvcompress_vllm.reporting.usage import UsageLog
from kvcompress_vllm.scheduling import admission
from kvcompress_vllm.scheduling.echo import EchoPlanner
from kvcompress_vllm.scheduling.planner import NEVER, CompressionPlanner, Tracked

logger = init_logger("vllm.kv_compress")

MARGIN = 8
"""For every so many requests one block stays free: some compressions come late."""


class _KVCompressMixin(Scheduler):
    """Adds a :class:`StepPlan` to every step, as ``SchedulerOutput.kv_compress``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = resolved_config(self.vllm_config)
        if config is None:
            raise RuntimeError("kv_compress: the scheduler was built without a configuration")
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        if not isinstance(manager, KVCompressManager):
            raise RuntimeError(f"kv_compress: the block manager is {type(manager).__name__}")
        if manager.block_pool.null_block.block_id != 0:
            raise RuntimeError("kv_compress: vLLM's null block is not block 0")
        scheduler_config = self.vllm_config.scheduler_config
        self.kv_compress_manager = manager
        self.kv_compress_planner = CompressionPlanner(
            config,
            manager.block_size,
            state_slots=scheduler_config.max_num_seqs,
            observe_slots=observe_slots(self.vllm_config, manager.block_pool.num_gpu_blocks),
            max_tokens=self.max_model_len,
        )
        self._recorder = Recorder(self.log_stats)
        self._shortage = Shortage()
        self._usage = UsageLog()
        self._digest = Digest(lambda line: logger.info("kv_compress: %s", line))
        manager.on_release = self._release
        self._output_length = admission.OutputLength()
        self._does_not_fit: tuple[str, int] | None = None
        self._check_integrity = integrity.enabled()
        self._echo: EchoPlanner | None = None
        if config.stores_echo:
            self._echo = EchoPlanner(
                config,
                manager.block_size,
                manager.block_pool.num_gpu_blocks,
                step_tokens(scheduler_config),
            )
        self._base_watermark = self.kv_cache_manager.watermark_blocks
        self._stock_allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_slots  # type: ignore[method-assign]
        self._stock_computed_blocks = self.kv_cache_manager.get_computed_blocks
        self.kv_cache_manager.get_computed_blocks = (  # type: ignore[method-assign]
            self._get_computed_blocks
        )
        # Makes vLLM ask how long a chunk may be.
        self.need_mamba_block_aligned_split = True
        _log_banner(self)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        computed = {r.request_id: r.num_computed_tokens for r in self.running}
        accumulations = self._accumulate(computed)
        compressions = self._compress_due(computed)
        scorings = self._score_due(computed)
        output = super().schedule(throttle_prefills)
        plan = self._plan(output, accumulations, scorings, compressions)
        output.kv_compress = plan  # type: ignore[attr-defined]
        if self._recorder.enabled:
            self._count_preemptions(output)
        if self._check_integrity:
            self.check_integrity()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        failures: dict[str, str] = {}
        for report in reports_of(model_runner_output):
            if report.failure is not None:
                failures[report.request_id] = report.failure
            elif isinstance(report, Scored):
                self.kv_compress_planner.scored(report)
            else:
                self._recorder.measured(report, self.kv_compress_planner.reported(report))
        failed = self._fail(failures)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            per_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            per_client.outputs.append(_error(request, failures[request.request_id]))
        if self._usage:
            for per_client in outputs.values():
                send(self._usage, per_client.outputs)
            self._usage.keep(self.requests)
        return outputs

    def _fail(self, failures: Mapping[str, str]) -> list[Request]:
        """Finish requests whose policy failed. What a worker kept of them is as many blocks as was
        said, so the accounting is exact; but their answers would not be those of their policy."""
        failed = [self.requests[name] for name in failures if name in self.requests]
        failed = [request for request in failed if not request.is_finished()]
        for request in failed:
            own = self._wish(request)
            logger.error(
                "kv_compress: %r ends with an error: policy=%r: %s",
                request.request_id,
                (own.policy if own is not None else None) or self.kv_compress_planner.config.policy,
                failures[request.request_id],
            )
        self.finish_requests([r.request_id for r in failed], RequestStatus.FINISHED_ERROR)
        return failed

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        planner, manager = self.kv_compress_planner, self.kv_compress_manager
        pool = manager.block_pool
        report = self._recorder.take(
            manager.packed,
            planner.observe_slots_used(),
            planner.observe_slots,
            Occupancy(
                pool.num_gpu_blocks - 1,
                pool.get_num_free_blocks(),
                len(self.running),
                len(self.waiting) + len(self.skipped_waiting),
                manager.held_by_packed(),
                len(pool.cached_block_hash_to_block),
            ),
        )
        return KVCompressSchedulerStats.of(stats, report)

    def check_integrity(self) -> None:
        """Check the whole pool; see :mod:`kvcompress_vllm.cache.integrity`.

        Raises:
            RuntimeError: with the numbers of the first violation.
        """
        held = [block for _, blocks in self.deferred_frees for block in blocks]
        self.kv_compress_manager.check_integrity(held)
        packed = {t.request_id for t in self.kv_compress_planner.packed()}
        if packed != set(self.kv_compress_manager.packed):
            raise RuntimeError(
                f"kv_compress: planner has packed {sorted(packed)}, block manager "
                f"{sorted(self.kv_compress_manager.packed)}"
            )

    def _accumulate(self, computed: Mapping[str, int]) -> list[Compression]:
        """What was observed in chunks of prefills since the last step."""
        return [
            self._compression(
                tracked,
                tracked.accumulated,
                self._row(tracked, tracked.accumulated),
                tracked.known,
                [],
                observed,
            )
            for tracked, observed in self.kv_compress_planner.accumulate(computed)
        ]

    def _compress_due(self, computed: Mapping[str, int]) -> list[Compression]:
        """Pack what is due as far as the pool allows; the rest waits for a later step."""
        planner, manager = self.kv_compress_planner, self.kv_compress_manager
        compressions: list[Compression] = []
        freed: list[KVCacheBlock] = []
        waits = False
        planner.watch(computed)
        if planner.config.on_pressure:
            planner.press(computed, manager.block_pool.get_num_free_blocks())
        for tracked in planner.due(computed):
            num_tokens, first = tracked.due_at, not tracked.kept
            covered, kept = planner.target(tracked)
            if manager.block_pool.get_num_free_blocks() < kept:
                waits = True
                continue  # a smaller one may fit, and makes room
            row = self._row(tracked, num_tokens)
            new, old = manager.pack(tracked.request_id, covered, kept)
            observed = planner.observed(tracked, num_tokens)
            compressions.append(self._compression(tracked, num_tokens, row, covered, new, observed))
            freed += old
            before = len(row) - tracked.covered + tracked.kept
            planner.compressed(tracked.request_id)
            after = len(row) - covered + kept
            if first:  # a long generation is compressed over and over
                self._digest.add(num_tokens, before, after)
            logger.debug(
                "kv_compress: %s: %d tokens, %d -> %d blocks",
                printable(tracked.request_id),
                num_tokens,
                before,
                after,
            )
        if waits:
            self._recorder.reserve_wait()
        # Last blocks first, so that prefix caching loses the ends of prompts before their starts.
        manager.block_pool.free_blocks(reversed(freed))
        return compressions

    def _score_due(self, computed: Mapping[str, int]) -> list[Compression]:
        """Have the worker score the requests whose mass budget needs a loss curve."""
        planner = self.kv_compress_planner
        scorings = []
        for tracked in planner.to_score(computed):
            num_tokens = tracked.due_at
            row, observed = self._row(tracked, num_tokens), planner.observed(tracked, num_tokens)
            covered, kept = planner.target(tracked)
            scorings.append(
                self._compression(tracked, num_tokens, row, covered, [0] * kept, observed)
            )
        return scorings

    def _row(self, tracked: Tracked, num_tokens: int) -> list[int]:
        """Block ids of a request as far as ``num_tokens`` tokens reach."""
        manager = self.kv_compress_manager
        return manager.row(tracked.request_id, -(-num_tokens // manager.block_size))

    def _compression(
        self,
        tracked: Tracked,
        num_tokens: int,
        row: list[int],
        covered: int,
        new_blocks: list[int],
        observed: Observed | None,
    ) -> Compression:
        assert tracked.observe_slot is not None
        own = tracked.own
        return Compression(
            tracked.request_id,
            tracked.state_slot,
            tracked.observe_slot,
            num_tokens,
            tracked.covered,
            tracked.kept,
            covered,
            row,
            new_blocks,
            own.policy if own else None,
            tracked.trigger,
            self.kv_compress_planner.floor(covered, own),
            own.protect if own else (),
            observed,
            tracked.unscored.before(covered * self.kv_compress_manager.block_size),
        )

    def _allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        blocks = self._admit(request, num_new_tokens, *args, **kwargs)
        if blocks is not None and self._echo is not None:
            # Now, not once the step is planned: the next request may hit these blocks already.
            first = request.num_computed_tokens + kwargs.get("num_new_computed_tokens", 0)
            manager = self.kv_compress_manager
            row = manager.row(request.request_id, None, first // manager.block_size)
            self._echo.allocated(self._policy(request), row, first, first + num_new_tokens)
        return blocks

    def _admit(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """vLLM's allocation, with slots and the reserve as further conditions of admission."""
        if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        planner, manager = self.kv_compress_planner, self.kv_cache_manager
        own = self._wish(request)
        if not planner.can_admit(request.num_tokens, own):
            self._recorder.refused("slots")
            return None
        reserve = planner.reserve(request.num_tokens, own)
        if not self._fits(request, reserve):
            self._recorder.refused("forecast")
            return None
        # vLLM skips its watermark when nothing runs: a lone prompt may take the whole pool, and
        # then stays uncompressed.
        manager.watermark_blocks = max(self._base_watermark, reserve)
        if planner.bounds_peak(request.num_tokens):
            kwargs["full_sequence_must_fit"] = False
        blocks = self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is not None:
            planner.admit(request.request_id, request.num_tokens, own)
        return blocks

    def _get_computed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        """vLLM's prefix cache lookup, except that what a compression observes is computed, and
        what has no echo scores where it needs them."""
        blocks, num_tokens, boundary = self._observed_blocks(request)
        echo, policy = self._echo, self._policy(request)
        if echo is None or not echo.reads(policy):
            return blocks, num_tokens, boundary
        if self.kv_compress_planner.first_due(request.num_tokens, self._wish(request)) == NEVER:
            return blocks, num_tokens, boundary
        ids = [block.block_id for block in blocks.blocks[0]]
        usable = echo.blocks.usable(ids, num_tokens)
        if usable < num_tokens:
            blocks = self.kv_cache_manager.create_kv_cache_blocks(
                tuple(
                    group[: usable // self.kv_compress_manager.block_size]
                    for group in blocks.blocks
                )
            )
        return blocks, usable, boundary

    def _observed_blocks(self, request: Request) -> tuple[KVCacheBlocks, int, int]:
        blocks, num_tokens, boundary = self._stock_computed_blocks(request)
        planner = self.kv_compress_planner
        own = self._wish(request)
        due_at = planner.first_due(request.num_tokens, own)
        first_observed = max(0, due_at - planner.config.window)
        if due_at > request.num_tokens:
            return blocks, num_tokens, boundary
        if planner.history(own) is not None:
            first_observed = 0  # a prefix that others computed has no statistics of all queries
        if num_tokens <= first_observed:
            return blocks, num_tokens, boundary
        usable = first_observed // planner.block_size
        cut = self.kv_cache_manager.create_kv_cache_blocks(
            tuple(group[:usable] for group in blocks.blocks)
        )
        return cut, usable * planner.block_size, boundary

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        # vLLM asks this of models with Mamba layers, which we refuse; a chunk of ours ends where a
        # compression is due.
        planner = self.kv_compress_planner
        first_token = request.num_computed_tokens + num_new_local_computed_tokens
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        count = planner.chunk(
            request.request_id,
            first_token,
            num_new_tokens,
            request.num_tokens if waits else 0,
            self._wish(request) if waits else None,
        )
        if self._echo is None or self.kv_compress_planner.history(self._wish(request)) is not None:
            return count
        tracked = planner.requests.get(request.request_id)
        return self._echo.chunk(
            self._policy(request),
            first_token,
            count,
            tracked.prefill_end if tracked else request.num_tokens,
            tracked.due_at
            if tracked
            else planner.first_due(request.num_tokens, self._wish(request)),
            len(self.running) - (not waits),
            # vLLM may have cut this chunk for the sake of encoder inputs, which only its going on
            # makes room for.
            waits=not request.has_encoder_inputs,
        )

    def _policy(self, request: Request) -> str | None:
        own = self._wish(request)
        return own.policy if own is not None else None

    def _wish(self, request: Request) -> Wish | None:
        """What a request asked for, as the planner takes it."""
        return self.kv_compress_planner.sized(request_wish(request.sampling_params))

    def _fits(self, request: Request, reserve: int) -> bool:
        """Whether the pool will hold the running requests and this one without preemption."""
        pool, planner = self.kv_compress_manager.block_pool, self.kv_compress_planner
        if not self.running:
            return True
        question = request.request_id, planner.version
        if question == self._does_not_fit:
            return False  # nothing has changed since: the forecast would not, either
        count = len(self.running) + 1
        loads = [self._load(r, planner.requests.get(r.request_id), count) for r in self.running]
        loads.append(self._load(request, None, count))
        most = admission.most_blocks(loads, planner.block_size)
        margin = len(loads) // MARGIN
        fits = most + reserve + margin < pool.num_gpu_blocks
        self._does_not_fit = None if fits else question
        return fits

    def _load(self, request: Request, tracked: Tracked | None, count: int) -> admission.Load:
        return admission.load(
            self.kv_compress_planner,
            tracked,
            request.num_computed_tokens,
            request.num_tokens,
            self._output_length.left(request.num_output_tokens, request.max_tokens),
            self.scheduler_config.max_num_batched_tokens,
            tracked.own if tracked else self._wish(request),
            count,
        )

    def _release(self, request_id: str) -> None:
        """Called when a request gives its blocks up."""
        self.kv_compress_planner.release(request_id)
        self._recorder.released(request_id)
        self._shortage.released(request_id)
        request = self.requests.get(request_id)
        if request is not None and request.is_finished():
            self._output_length.finished(request.num_output_tokens)
        if request is None or request.is_finished():
            self._recorder.finished(request_id)

    def _count_preemptions(self, output: SchedulerOutput) -> None:
        """Record what this step preempted, and what it would have without pressure."""
        manager = self.kv_compress_manager

        def blocks(request: Request) -> int:
            covered, kept = manager.packed.get(request.request_id, (0, 0))
            return len(manager.req_to_blocks[request.request_id]) - covered + kept

        avoided = self._shortage.step(
            manager.block_pool.get_num_free_blocks(),
            lambda request_id: self.requests[request_id].num_computed_tokens,
            ((request.request_id, blocks(request)) for request in reversed(self.running)),
        )
        self._recorder.stepped(len(output.preempted_req_ids or ()), avoided)

    def _plan(
        self,
        output: SchedulerOutput,
        accumulations: list[Compression],
        scorings: list[Compression],
        compressions: list[Compression],
    ) -> StepPlan:
        planner, manager = self.kv_compress_planner, self.kv_compress_manager
        plan = StepPlan(
            released=planner.take_released(),
            accumulations=accumulations,
            scorings=[c for c in scorings if c.request_id in planner.requests],
            # A request that was compressed and then preempted in the same step owns nothing.
            compressions=[c for c in compressions if c.request_id in manager.packed],
        )
        for item in plan.compressions:
            self._recorder.compressed(item)
            self._shortage.compressed(item, planner.requests[item.request_id].usual_due)
            self._usage.compressed(item)
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            first_token = self.requests[request_id].num_computed_tokens - num_tokens
            observation = planner.observe(request_id, first_token, num_tokens)
            if observation is not None:
                plan.observations.append(observation)
            if self._echo is not None:
                self._score(plan, request_id, first_token, first_token + num_tokens)
            if num_tokens > 1 and request_id in manager.packed:
                plan.packed_prefills.append(request_id)
        if self._check_integrity:
            plan.expected = [
                PackedRow(t.request_id, t.state_slot, t.covered, manager.row(t.request_id, t.kept))
                for t in planner.packed()
            ]
        return plan

    def _score(self, plan: StepPlan, request_id: str, first: int, end: int) -> None:
        """Have a step's tokens ``[first, end)`` scored, or note that they are not."""
        assert self._echo is not None
        span = self._echo.span(request_id, self._policy(self.requests[request_id]), first, end)
        if span is not None:
            plan.echoes.append(span)
        tracked = self.kv_compress_planner.requests.get(request_id)
        if tracked is not None:
            tracked.unscored.computed(first, end, span is not None)


class KVCompressScheduler(_KVCompressMixin, Scheduler):
    """Synchronous scheduling with compression."""


class KVCompressAsyncScheduler(_KVCompressMixin, AsyncScheduler):
    """Asynchronous scheduling with compression."""


def make_scheduler(**kwargs: Any) -> Scheduler:
    """What ``scheduler_cls`` names; picks the class once vLLM has decided on async scheduling."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (KVCompressAsyncScheduler if asynchronous else KVCompressScheduler)(**kwargs)


def _error(request: Request, reason: str) -> EngineCoreOutput:
    """The last output of a request that ends with an error; HTTP 500."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        stop_reason=f"kv_compress: {reason}",
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )


def _log_banner(scheduler: _KVCompressMixin) -> None:
    planner, manager = scheduler.kv_compress_planner, scheduler.kv_compress_manager
    blocks = manager.block_pool.num_gpu_blocks - 1
    length = scheduler.max_model_len
    covered, kept = planner.packed_size(length)
    full = -(-length // manager.block_size)
    logger.info("kv_compress: %s", planner.config)
    logger.info(
        "kv_compress: %d blocks of %d tokens; a prompt of %d tokens takes %d blocks, %d once "
        "compressed: room for %.1f such requests instead of %.1f",
        blocks,
        manager.block_size,
        length,
        full,
        full - covered + kept,
        blocks / max(1, full - covered + kept),
        blocks / full,
    )
