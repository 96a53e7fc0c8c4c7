# SPDX-License-Identifier: Apache-2.0
"""What is told of a step: to the metrics, to the log, and with each request's usage."""

from __future__ import annotations

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from kvcompress_vllm.config.rules import printable
from kvcompress_vllm.integration.engine.groups import OtherGroups
from kvcompress_vllm.records.plan import StepPlan
from kvcompress_vllm.reporting.acceptance import Acceptance
from kvcompress_vllm.reporting.digest import Digest
from kvcompress_vllm.reporting.metrics import Occupancy, Recorder, StepReport
from kvcompress_vllm.reporting.shared import SharedReport
from kvcompress_vllm.reporting.shortage import Shortage
from kvcompress_vllm.reporting.usage import UsageLog
from kvcompress_vllm.scheduling.planner import CompressionPlanner

logger = init_logger("vllm.kv_compress")


class Recording:
    """Counts what the steps of a scheduler do.

    Args:
        scheduler: whose requests these are.
        planner: knows when they would have been compressed.
        others: cache groups that are not compressed.
        recorder: collects what the metrics say.
        usage: collects what is told with each request.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        planner: CompressionPlanner,
        others: OtherGroups,
        recorder: Recorder,
        usage: UsageLog,
    ) -> None:
        self._scheduler, self._planner, self._others = scheduler, planner, others
        self._recorder, self._usage = recorder, usage
        self._shortage = Shortage()
        self._digest = Digest(lambda line: logger.info("kv_compress: %s", line))
        self._acceptance = Acceptance(lambda line: logger.warning("kv_compress: %s", line))

    def step(self, plan: StepPlan, output: SchedulerOutput, waits: bool) -> None:
        """Record a step that was planned.

        Args:
            waits: whether a compression waits for room.
        """
        if waits:
            self._recorder.reserve_wait()
        for item in plan.compressions:
            self._recorder.compressed(item)
            tracked = self._planner.requests[item.request_id]
            self._shortage.compressed(item, tracked.usual_due)
            marks = self._planner.marks(tracked.sizes, tracked.prefill_end)
            self._usage.compressed(item, item.num_tokens if item.num_tokens in marks else None)
            before = item.old_packing.held(len(item.old_blocks))
            after = item.packing.held(len(item.old_blocks))
            if not item.old_kept:  # a long generation is compressed over and over
                self._digest.add(item.num_tokens, before, after)
            logger.debug(
                "kv_compress: %s: %d tokens, %d -> %d blocks",
                printable(item.request_id),
                item.num_tokens,
                before,
                after,
            )
        if self._recorder.enabled:
            self._count_preemptions(output)

    def verified(self, output: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """Note what became of the drafted tokens of a step that is back."""
        invalid = output.num_invalid_spec_tokens or {}
        for request_id, drafted in output.scheduled_spec_decode_tokens.items():
            row = result.req_id_to_index.get(request_id)
            sampled = result.sampled_token_ids[row] if row is not None else ()
            if len(sampled):  # what is drafted of a prompt, to fill it up, is not verified
                count = len(drafted) - invalid.get(request_id, 0)
                packed = request_id in self._others.manager.packed
                accepted = min(count, len(sampled) - 1)
                self._acceptance.verified(packed, count, accepted)
                self._recorder.verified(packed, count, accepted)
                self._usage.verified(request_id, count, accepted)

    def released(self, request_id: str, ended: bool) -> None:
        """Note that a request gave its blocks up.

        Args:
            ended: whether it will not come back.
        """
        self._recorder.released(request_id)
        self._shortage.released(request_id)
        if ended:
            self._recorder.finished(request_id)

    def take(self, shared: SharedReport) -> StepReport:
        """What happened since the last call.

        Args:
            shared: the same of packed prefixes that requests share.
        """
        planner, manager, pool = (
            self._planner,
            self._others.manager,
            self._others.manager.block_pool,
        )
        others = sum(map(self._others.held, manager.packed)) if self._others else 0
        return self._recorder.take(
            manager.packed,
            planner.observers.used,
            planner.observers.count,
            Occupancy(
                pool.num_gpu_blocks - 1,
                pool.get_num_free_blocks(),
                *self._scheduler.get_request_counts(),
                manager.held_by_packed() + others - shared.saved_blocks,
                len(pool.cached_block_hash_to_block),
            ),
            shared,
        )

    def _count_preemptions(self, output: SchedulerOutput) -> None:
        """Record what this step preempted, and what it would have without pressure."""
        manager, others, requests = self._others.manager, self._others, self._scheduler.requests

        def blocks(request: Request) -> int:
            return manager.held(request.request_id) + others.held(request.request_id)

        running = reversed(self._scheduler.running)
        avoided = self._shortage.step(
            manager.block_pool.get_num_free_blocks(),
            lambda request_id: requests[request_id].num_computed_tokens,
            ((request.request_id, blocks(request)) for request in running),
        )
        self._recorder.stepped(len(output.preempted_req_ids or ()), avoided)
