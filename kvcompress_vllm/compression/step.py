# SPDX-License-Identifier: Apache-2.0
"""The start of a step in a worker, before its forward: what the scheduler's plan asks for."""

from __future__ import annotations

from kvcompress_vllm.cache import integrity
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.pending import PendingReports
from kvcompress_vllm.records.plan import StepPlan


def start_step(plan: StepPlan, compressor: Compressor) -> list[PendingReports]:
    """Release, accumulate, score, compress, drop, in this order.

    The caller then replaces the front of every compressed row (``Compression.row_prefix``) and
    observes queries in the forward.

    Returns:
        What there is to report, once the device has done it.

    Raises:
        RuntimeError: integrity is checked, and the state is not what the scheduler expects.
    """
    compressor.state.release(plan.released)
    compressor.accumulate(plan.accumulations)
    pending = compressor.run(plan.scorings, score_only=True)
    pending += compressor.run(plan.compressions)
    compressor.state.release(plan.dropped)
    if plan.expected is not None:
        integrity.check_state(compressor.state, plan.expected)
    return pending
