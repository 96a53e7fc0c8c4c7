# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM's releases, in the shapes of all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.v1.core.sched.request_queue import FCFSRequestQueue

from kvcompress_vllm.integration.compat.releases import those_taken, waiting_queues


def test_requests_wait_in_one_queue_or_two() -> None:
    waiting, skipped = FCFSRequestQueue(), FCFSRequestQueue()  # empty, so they are false
    (only,) = waiting_queues(SimpleNamespace(waiting=waiting))
    assert only is waiting
    first, second = waiting_queues(SimpleNamespace(waiting=waiting, skipped_waiting=skipped))
    assert first is skipped and second is waiting


def test_an_argument_that_went_is_left_out() -> None:
    """As ``require_gpu_on_driver`` of ``initialize_ray_cluster`` in 0.33."""

    def before(config: Any, address: Any = None, gpu: bool = True) -> None: ...
    def since(config: Any, address: Any = None) -> None: ...

    assert those_taken(before, {"gpu": False}) == {"gpu": False}
    assert those_taken(since, {"gpu": False}) == {}
