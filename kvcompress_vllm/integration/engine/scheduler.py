# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler with compression: plans it, accounts for it, and sends it with the step.

The scheduler decides how many blocks a request gives back, a plain integer that needs no feedback,
so the accounting is exact with async scheduling and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.cache import integrity
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.config.rules import printable
from kvcompress_vllm.integration.compat.releases import admitting, hash_lookahead
from kvcompress_vllm.integration.engine import queues, utilities
from kvcompress_vllm.integration.engine.admission import Admission
from kvcompress_vllm.integration.engine.banner import log_banner, warn_of_small_steps
from kvcompress_vllm.integration.engine.chunks import Chunks
from kvcompress_vllm.integration.engine.groups import OtherGroups
from kvcompress_vllm.integration.engine.kv_cache import budget_of, cache_group
from kvcompress_vllm.integration.engine.recording import Recording
from kvcompress_vllm.integration.engine.replay import Replays
from kvcompress_vllm.integration.engine.sharing import Sharing
from kvcompress_vllm.integration.engine.step import StepBuilder
from kvcompress_vllm.integration.engine.unfinished import UnfinishedSegments
from kvcompress_vllm.integration.frontend.requests import received_budget, stalls_alone
from kvcompress_vllm.integration.frontend.stats import KVCompressSchedulerStats
from kvcompress_vllm.integration.frontend.usage import send
from kvcompress_vllm.integration.sizing import (
    check_step_sizes,
    context_slots,
    draft_tokens,
    observe_slots,
    step_tokens,
)
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.integration.worker.reports import reports_of
from kvcompress_vllm.records.budget import KEEP_ALL
from kvcompress_vllm.records.report import Scored
from kvcompress_vllm.reporting.metrics import Recorder
from kvcompress_vllm.reporting.usage import UsageLog
from kvcompress_vllm.scheduling.echo import EchoPlanner
from kvcompress_vllm.scheduling.planner import CompressionPlanner

logger = init_logger("vllm.kv_compress")


class _KVCompressMixin(Scheduler):
    """Adds a :class:`StepPlan` to every step, as ``SchedulerOutput.kv_compress``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = resolved_config(self.vllm_config)
        if config is None:
            raise RuntimeError("kv_compress: the scheduler was built without a configuration")
        others = OtherGroups(self.kv_cache_manager.coordinator, self.vllm_config)
        manager = others.manager
        if manager.block_pool.null_block.block_id != 0:
            raise RuntimeError("kv_compress: vLLM's null block is not block 0")
        scheduler_config = self.vllm_config.scheduler_config
        groups = kwargs["kv_cache_config"].kv_cache_groups
        group = groups[others.index]
        self.kv_compress_group = cache_group(group.kv_cache_spec, len(group.layer_names))
        blocks = manager.block_pool.num_gpu_blocks
        check_step_sizes(self.vllm_config, manager.block_size)
        self.kv_compress_manager = manager
        self.kv_compress_others = others
        self.kv_compress_planner = CompressionPlanner(
            config,
            manager.block_size,
            state_slots=scheduler_config.max_num_seqs,
            observe_slots=observe_slots(self.vllm_config, self.kv_compress_group, blocks),
            max_tokens=self.max_model_len,
            context_slots=context_slots(self.vllm_config, blocks),
            drafts=draft_tokens(self.vllm_config),
            kernel_blocks=self.kv_compress_group.kernel_blocks,
        )
        ranks = self.vllm_config.parallel_config.tensor_parallel_size
        # A block has room for a layer more where another group has one.
        layers = max(len(each.layer_names) for each in groups)
        block_bytes = self.kv_compress_group.block_bytes * layers // len(group.layer_names) * ranks
        self._recorder = Recorder(self.log_stats, block_bytes)
        self._usage = UsageLog(block_bytes)
        self._recording = Recording(
            self, self.kv_compress_planner, others, self._recorder, self._usage
        )
        self.kv_compress_sharing = Sharing(
            others,
            self.kv_compress_planner,
            self._usage,
            self.requests,
            hash_lookahead(self.vllm_config),
        )
        manager.on_release = self._release
        self._failures: dict[str, str] = {}
        """Why requests that came since the last step cannot be served, by id."""
        self._check_integrity = integrity.enabled()
        self._echo: EchoPlanner | None = None
        if config.stores_echo:
            self._echo = EchoPlanner(
                config,
                manager.block_size if self.cache_config.enable_prefix_caching else None,
                blocks,
                step_tokens(scheduler_config),
            )
            warn_of_small_steps(scheduler_config, self.num_spec_tokens)
        planner, sharing = self.kv_compress_planner, self.kv_compress_sharing
        self._replays = Replays(self, planner, manager)
        if config.exact != "off":
            self._replays.prepare()
        group = self.kv_compress_group
        self._unfinished = UnfinishedSegments(
            manager,
            planner,
            sharing.tails,
            group,
            self._echo.blocks if self._echo is not None and sharing.names.on else None,
        )
        self._admission = Admission(
            self,
            planner,
            self._recorder,
            sharing,
            self._replays,
            others,
            self._unfinished,
            self._echo,
        )
        self._chunks = Chunks(
            self, planner, self._admission, self._replays, self._unfinished, self._echo
        )
        self._steps = StepBuilder(
            planner, manager, sharing, self._replays, self._unfinished, self._echo, group, others
        )
        # Makes vLLM ask how long a chunk may be.
        self.need_mamba_block_aligned_split = True
        log_banner(self.kv_compress_planner, blocks - 1, groups, others)

    def add_request(self, request: Request) -> None:
        if request.request_id in self._replays:
            super().add_request(request)
            return
        # Nothing that a request carries may raise here: that would end the engine for everybody.
        budget, problem = None, None
        try:
            budget = received_budget(self.kv_compress_planner.config, request.sampling_params)
            if budget is not None and budget.exact:
                self._replays.check(request, budget)
            problem = self._admission.too_large(request, budget)
            found = self.kv_compress_sharing.names.found(request, budget)
            stalls = found is not None and stalls_alone(self.vllm_config, found)
            if not stalls and self._admission.too_large(request, found) is None:
                budget = found
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            # With a step in flight it computes something before it ends. Nothing may go by a budget
            # that was refused.
            budget = resolve(self.kv_compress_planner.config, KEEP_ALL)
            self._failures[request.request_id] = problem
        request.kv_compress_budget = budget  # type: ignore[attr-defined]
        self.kv_compress_sharing.added(request, budget)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        unverified = self.kv_compress_planner.unverified
        computed = unverified.of_all({r.request_id: r.num_computed_tokens for r in self.running})
        self._failures |= self._replays.advance(computed)
        plan = self._steps.begin(computed)
        served: list[Request] = []
        part_waits, held = self._replays.hold_back()
        if not part_waits:
            served, held = self.kv_compress_sharing.hold_back(self)
        with queues.without(self, held, served), admitting(self, part_waits):
            output = super().schedule(*args, **kwargs)
        self._steps.complete(
            plan,
            output.num_scheduled_tokens,
            output.scheduled_spec_decode_tokens,
            self.requests,
            self._check_integrity,
        )
        unverified.sent(output.scheduled_spec_decode_tokens)
        self._recording.step(plan, output, self._steps.waits)
        output.kv_compress = plan  # type: ignore[attr-defined]
        if self._check_integrity:
            self.check_integrity()
        return output

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        done: bool = super().reset_prefix_cache(*args, **kwargs)
        if done:
            self.kv_compress_planner.contexts.clear()
        return done

    def update_from_output(
        self,
        scheduler_output: SchedulerOutput,
        model_runner_output: ModelRunnerOutput,
        *args: Any,
        **kwargs: Any,
    ) -> dict[int, EngineCoreOutputs]:
        drafted = scheduler_output.scheduled_spec_decode_tokens
        self.kv_compress_planner.unverified.verified(drafted)
        self._recording.verified(scheduler_output, model_runner_output)
        failures, self._failures = self._failures, {}
        for told in reports_of(model_runner_output):
            report = told._replace(
                curve=told.curve.in_blocks_of(self.kv_compress_group.kernel_blocks)
            )
            if report.failure is not None:
                failures[report.request_id] = report.failure
                users = self.kv_compress_planner.feedback.spoiled(report)
                failures.update(dict.fromkeys(users, report.failure))
                self.kv_compress_sharing.tails.forget()
            elif isinstance(report, Scored):
                self.kv_compress_planner.feedback.scored(report)
            else:
                self._recorder.measured(report, self.kv_compress_planner.feedback.reported(report))
        failed = self._fail(failures)
        outputs = super().update_from_output(scheduler_output, model_runner_output, *args, **kwargs)
        if self._replays:
            for per_client in outputs.values():
                per_client.outputs = self._replays.without(per_client.outputs)
        for request in failed:
            per_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            per_client.outputs.append(_error(request, failures[request.request_id]))
        if self._usage:
            for per_client in outputs.values():
                send(self._usage, per_client.outputs)
            self._usage.keep(self.requests)
        return outputs

    def _fail(self, failures: Mapping[str, str]) -> list[Request]:
        """Finish requests that should not be here, and those whose policy failed. What a worker
        kept of these is as many blocks as was said, so the accounting is exact; but their answers
        would not be those of their policy."""
        failed = [self.requests[name] for name in failures if name in self.requests]
        failed = [request for request in failed if not request.is_finished()]
        for request in failed:
            budget = budget_of(request)
            logger.error(
                "kv_compress: %s (policy=%r) ends with an error: %s",
                printable(request.request_id),
                budget.policy if budget is not None else self.kv_compress_planner.config.policy,
                failures[request.request_id],
            )
        self.finish_requests([r.request_id for r in failed], RequestStatus.FINISHED_ERROR)
        return failed

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        report = self._recording.take(self.kv_compress_sharing.report())
        return KVCompressSchedulerStats.of(stats, report)

    def check_integrity(self) -> None:
        """Check the whole pool; see :mod:`kvcompress_vllm.cache.integrity`.

        Raises:
            RuntimeError: with the numbers of the first violation.
        """
        held = [block for _, blocks in self.deferred_frees for block in blocks]
        held += self.kv_compress_others.blocks()
        contexts = self.kv_compress_planner.contexts.described
        shared = {block for context in contexts for block in context.blocks}
        self.kv_compress_manager.check_integrity(held, shared)
        self.kv_compress_sharing.check_integrity()
        packed = {t.request_id for t in self.kv_compress_planner.packed()}
        if packed != set(self.kv_compress_manager.packed):
            raise RuntimeError(
                f"kv_compress: planner has packed {sorted(packed)}, block manager "
                f"{sorted(self.kv_compress_manager.packed)}"
            )

    def _mamba_block_aligned_split(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_local_computed_tokens: int = 0,
        num_external_computed_tokens: int = 0,
    ) -> int:
        # vLLM asks this of models whose Mamba states it caches, which is refused.
        first_token = request.num_computed_tokens + num_new_local_computed_tokens
        return self._chunks.length(request, first_token, num_new_tokens)

    def _release(self, request_id: str) -> None:
        """Called when a request gives its blocks up."""
        if request_id in self._replays:
            return
        request = self.requests.get(request_id)
        if request is not None and request.is_finished():
            self._unfinished.ended(request)
        self.kv_compress_planner.release(request_id)
        self.kv_compress_sharing.released(request, request_id)
        if request is not None and request.is_finished():
            self._admission.finished(request)
        self._recording.released(request_id, ended=request is None or request.is_finished())


class KVCompressScheduler(_KVCompressMixin, Scheduler):
    """Synchronous scheduling with compression."""


class KVCompressAsyncScheduler(_KVCompressMixin, AsyncScheduler):
    """Asynchronous scheduling with compression."""


def make_scheduler(**kwargs: Any) -> Scheduler:
    """What ``scheduler_cls`` names; picks the class once vLLM has decided on async scheduling."""
    utilities.install()
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
