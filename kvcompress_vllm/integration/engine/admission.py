# SPDX-License-Identifier: Apache-2.0
"""Who may start: slots, the reserve and the forecast, as conditions of vLLM's own allocation."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.reporting.metrics import Recorder
from kvcompress_vllm.scheduling import admission
from kvcompress_vllm.scheduling.need import blocks_needed
from kvcompress_vllm.scheduling.observation import first_observed
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked

MARGIN = 8
"""For every so many requests one block stays free: some compressions come late."""


class Admission:
    """Stands before two methods of a scheduler's KV cache manager.

    Args:
        scheduler: whose manager's ``allocate_slots`` and ``get_computed_blocks`` are replaced.
        planner: that of the scheduler.
        recorder: is told why a request had to wait.
    """

    def __init__(
        self, scheduler: Scheduler, planner: CompressionPlanner, recorder: Recorder
    ) -> None:
        self._scheduler, self._planner, self._recorder = scheduler, planner, recorder
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
        needed = blocks_needed(self._planner.sizes(budget), self._planner.config.window, length)
        most = self._manager.block_pool.num_gpu_blocks - 1
        return None if needed <= most else f"it may need {needed} blocks of {most}"

    def allocate_slots(
        self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any
    ) -> KVCacheBlocks | None:
        """vLLM's allocation, with slots and the reserve as further conditions of admission."""
        if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            return self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        planner, manager = self._planner, self._manager
        budget = budget_of(request)
        if not planner.can_admit(request.num_tokens, budget):
            self._recorder.refused("slots")
            return None
        reserve = planner.reserve(request.num_tokens, budget)
        if not self._fits(request, reserve):
            self._recorder.refused("forecast")
            return None
        # vLLM skips its watermark when nothing runs: a lone prompt may take the whole pool, and
        # then stays uncompressed.
        manager.watermark_blocks = max(self._base_watermark, reserve)
        if planner.sizes(budget).first_due(request.num_tokens) < request.num_tokens:
            kwargs["full_sequence_must_fit"] = False
        blocks = self._stock_allocate_slots(request, num_new_tokens, *args, **kwargs)
        if blocks is not None:
            planner.admit(request.request_id, request.num_tokens, budget)
        return blocks

    def get_computed_blocks(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int]:
        """vLLM's prefix cache lookup, except that what a compression observes is computed."""
        blocks, num_tokens, boundary = self._stock_computed_blocks(request, *args, **kwargs)
        planner = self._planner
        sizes = planner.sizes(budget_of(request))
        due_at = sizes.first_due(request.num_tokens)
        usable = first_observed(sizes.budget, due_at, planner.config.window) // planner.block_size
        lost = num_tokens - usable * planner.block_size
        if due_at > request.num_tokens or lost <= 0:
            return blocks, num_tokens, boundary
        stats = self._manager.prefix_cache_stats
        if stats is not None:  # vLLM has counted them as hits
            if request.num_preemptions > 0:
                stats.preempted_hits -= lost
            else:
                stats.hits -= lost
        cut = self._manager.create_kv_cache_blocks(tuple(group[:usable] for group in blocks.blocks))
        return cut, num_tokens - lost, boundary

    def _fits(self, request: Request, reserve: int) -> bool:
        """Whether the pool will hold the running requests and this one without preemption."""
        pool, planner, running = self._manager.block_pool, self._planner, self._scheduler.running
        if not running:
            return True
        question = request.request_id, planner.version
        if question == self._does_not_fit:
            return False  # nothing has changed since: the forecast would not, either
        count = len(running) + 1
        loads = [self._load(r, planner.requests.get(r.request_id), count) for r in running]
        loads.append(self._load(request, None, count))
        most = admission.most_blocks(loads, planner.block_size)
        margin = len(loads) // MARGIN
        fits = most + reserve + margin < pool.num_gpu_blocks
        self._does_not_fit = None if fits else question
        return fits

    def _load(self, request: Request, tracked: Tracked | None, count: int) -> admission.Load:
        return admission.load(
            self._planner,
            tracked,
            request.num_computed_tokens,
            request.num_tokens,
            self._output_length.left(request.num_output_tokens, request.max_tokens),
            self._scheduler.scheduler_config.max_num_batched_tokens,
            budget_of(request),
            count,
        )


def budget_of(request: Request) -> RequestBudget | None:
    """The budget of a request; None: the configured one."""
    budget: RequestBudget | None = getattr(request, "kv_compress_budget", None)
    return budget
