# SPDX-License-Identifier: Apache-2.0
"""How many tokens of a request a step computes: a chunk ends where a compression is due."""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.integration.compat.releases import waiting_queues
from kvcompress_vllm.integration.engine.admission import Admission
from kvcompress_vllm.integration.engine.kv_cache import budget_of
from kvcompress_vllm.integration.engine.replay import Replays
from kvcompress_vllm.integration.engine.unfinished import UnfinishedSegments
from kvcompress_vllm.scheduling.echo import EchoPlanner
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked


class Chunks:
    """Asked for every request on every step.

    Args:
        scheduler: whose requests these are.
        planner: knows what is due.
        admission: knows what a request takes that is about to start.
        replays: knows which requests repeat a context.
        unfinished: knows who starts in the middle of a segment.
        echo: says where chunks end for echo scores; None: no policy reads any.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        planner: CompressionPlanner,
        admission: Admission,
        replays: Replays,
        unfinished: UnfinishedSegments,
        echo: EchoPlanner | None,
    ) -> None:
        self._scheduler, self._planner, self._admission = scheduler, planner, admission
        self._replays, self._unfinished, self._echo = replays, unfinished, echo

    def length(self, request: Request, first_token: int, num_new_tokens: int) -> int:
        """How many of ``num_new_tokens`` tokens from position ``first_token`` on the next step
        computes; 0: the request waits for a later one."""
        planner, num_spec_tokens = self._planner, self._scheduler.num_spec_tokens
        tracked = planner.requests.get(request.request_id)
        # Not `in_prefill` of it: this is asked for every decoding request on every step.
        if tracked is not None and first_token >= tracked.prefill_end < tracked.due_at:
            # It decodes, and nothing is due that its prompt began. What is drafted ends where a
            # compression is due: what comes behind attends to what that keeps, accepted or not.
            if not num_spec_tokens:
                return num_new_tokens
            left = tracked.due_at - first_token
            certain = planner.unverified.certain(request.request_id, first_token)
            if left <= 0 and certain < tracked.due_at:
                return 0  # a step in flight says whether it has come so far
            return min(num_new_tokens, max(1, left))
        if request.request_id in self._replays:
            return self._replays.chunk(request, first_token, num_new_tokens)
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        # Beside generations vLLM fills up a last token with what is sure to be rejected. That may
        # lie behind a compression, and must not be cut: it says so to the worker all the same.
        real = request.num_tokens - first_token
        if waits and num_spec_tokens and num_new_tokens > real == 1:
            return num_new_tokens * self._prompt(request, tracked, first_token, 1)
        return self._prompt(request, tracked, first_token, num_new_tokens)

    def _prompt(
        self, request: Request, tracked: Tracked | None, first_token: int, num_new_tokens: int
    ) -> int:
        """The same of a prompt."""
        planner, scheduler = self._planner, self._scheduler
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        until = 0 if tracked is None else tracked.heard_until
        if tracked is None:
            if not waits and self._echo is None:
                return num_new_tokens  # it is never compressed
            tracked = planner.newcomers.starting(
                request.request_id,
                request.num_tokens,
                budget_of(request),
                self._admission.hit(request),
            )
            if waits:
                tracked.observe_slot = -1  # it starts with one, or not at all
                until = self._unfinished.until(request.request_id)
        count = planner.chunk(tracked, first_token, num_new_tokens)
        if self._echo is None:
            return count
        taken = max(0, until - first_token)  # of a segment that it takes over
        if taken and (
            count <= taken
            or scheduler.num_spec_tokens
            or not planner.observers.passes(
                tracked,
                first_token + count,
                waits,
                sum(map(len, waiting_queues(scheduler))) - waits,
            )
        ):
            return min(count, taken)
        return taken + self._echo.chunk(
            tracked.budget,
            first_token + taken,
            count - taken,
            tracked.prefill_end,
            tracked.due_at,
            (len(scheduler.running) - (not waits)) * (1 + scheduler.num_spec_tokens),
            # vLLM may have cut this chunk for the sake of encoder inputs, and only its going on
            # makes room for those.
            may_wait=not request.has_encoder_inputs,
        )
