# SPDX-License-Identifier: Apache-2.0
"""vLLM's queues of waiting requests, without those that a step must not start."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from kvcompress_vllm.integration.compat.releases import waiting_queues


@contextmanager
def without(
    scheduler: Scheduler, held: Sequence[Request], served: Sequence[Request] = ()
) -> Iterator[None]:
    """Take requests out of the queues until the block is left.

    Args:
        held: are then where they were before: who waits for something else than room must not
            pass those who wait for room.
        served: come then before all others.
    """
    if not held and not served:
        yield
        return
    queues = [(queue, list(queue)) for queue in waiting_queues(scheduler)]
    names = {request.request_id for request in held}
    for queue, _ in queues:
        queue.remove_requests([*held, *served])
    try:
        yield
    finally:
        for queue, before in queues:
            out: list[Request] = [r for r in before if r.request_id in names]
            ordered = isinstance(queue, deque)  # else a heap, which knows where they belong
            if out and ordered:
                place = {request.request_id: index for index, request in enumerate(before)}
                left = list(queue)
                queue.remove_requests(left)
                # vLLM puts those first whom it has preempted meanwhile.
                out = sorted(left + out, key=lambda r: place.get(r.request_id, -1))
            for request in reversed(out):
                queue.prepend_request(request)
        for request in reversed(served):
            queues[0][0].prepend_request(request)
