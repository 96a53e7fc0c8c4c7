# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler statistics with our report inside, and how they survive the trip.

vLLM sends ``SchedulerStats`` from the engine process to the front end as msgpack and decodes it by
its declared type, which would drop our field. So the front end declares ours before its decoder
exists; a decoder that knows only vLLM's type (another front end) ignores the field.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats

from kvcompress_vllm.reporting.metrics import StepReport


@dataclass
class KVCompressSchedulerStats(SchedulerStats):
    """``SchedulerStats`` of an engine that compresses."""

    kv_compress: StepReport | None = None

    @classmethod
    def of(cls, stats: SchedulerStats, report: StepReport) -> KVCompressSchedulerStats:
        """vLLM's statistics of a step, and ours."""
        return cls(**vars(stats), kv_compress=report)


def declare() -> None:
    """Have decoders built from now on keep the report; idempotent.

    msgspec looks at the type once, when the process builds its first decoder.
    """
    EngineCoreOutputs.__annotations__["scheduler_stats"] = KVCompressSchedulerStats | None
