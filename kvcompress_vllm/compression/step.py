# SPDX-License-Identifier: Apache-2.0
"""The start of a step in a worker, before its forward: what the scheduler's plan asks for."""

from __future__ import annotations

from collections.abc import Sequence

from kvcompress_vllm.cache import integrity
from kvcompress_vllm.compression import replay, unfinished
from kvcompress_vllm.compression.batch import Item
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.pending import PendingReports
from kvcompress_vllm.records.plan import StepPlan


def start_step(plan: StepPlan, compressors: Sequence[Compressor]) -> list[PendingReports]:
    """Save queries, release, accumulate, score, compress, drop, load queries, in this order; and
    forget the scores of contexts that the step begins to repeat.

    Args:
        compressors: one per cache group, by index.

    The caller then replaces the front of every compressed row (``Compression.row_prefix``) and
    observes queries in the forward.

    Returns:
        What there is to report, once the device has done it.

    Raises:
        RuntimeError: integrity is checked, and the state is not what the scheduler expects.
    """
    pending: list[PendingReports] = []
    for compressor in compressors:
        group = compressor.group.index
        unfinished.save(compressor.rank, plan.saved)
        compressor.state.release(plan.released)
        compressor.accumulate(_of(plan.accumulations, group))
        pending += compressor.run(_of(plan.scorings, group), score_only=True)
        pending += compressor.run(_of(plan.compressions, group))
        compressor.state.release(plan.dropped)
        unfinished.load(compressor.rank, plan.loaded)
        for item in plan.replays:
            if item.begins:
                replay.clear(compressor.state, item.blocks[: item.num_context])
        if plan.expected is not None:
            expected = [row for row in plan.expected if row.group == group]
            integrity.check_state(compressor.state, expected)
    return pending


def _of(items: Sequence[Item], group: int) -> list[Item]:
    return [item for item in items if item.group == group]
