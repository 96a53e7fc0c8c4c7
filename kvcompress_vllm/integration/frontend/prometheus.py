# SPDX-License-Identifier: Apache-2.0
"""Reports of the scheduler as Prometheus metrics, beside vLLM's own, and kept for the live page.

Not an entry point of ``vllm.stat_logger_plugins``: the mere presence of one makes vLLM collect
statistics in spite of ``--disable-log-stats``, in every server, compressed or not.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerManager
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from kvcompress_vllm.integration.frontend import stats
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.reporting import metrics
from kvcompress_vllm.reporting.history import History
from kvcompress_vllm.reporting.metrics import METRICS, Metric, StepReport

logger = init_logger("vllm.kv_compress")

LABELS = ("model_name", "engine")
_registered: list[Any] = []
_PATCHED = "_kv_compress_patched"


def install() -> None:
    """Report to Prometheus wherever vLLM keeps statistics of a compressed engine; idempotent."""
    stats.declare()
    if getattr(StatLoggerManager, _PATCHED, False):
        return
    setattr(StatLoggerManager, _PATCHED, True)
    stock = StatLoggerManager.__init__

    @functools.wraps(stock)
    def __init__(  # noqa: N807
        self: Any,
        vllm_config: VllmConfig,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list[Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if resolved_config(vllm_config) is not None:
            custom_stat_loggers = custom_stat_loggers or []
            custom_stat_loggers = [*custom_stat_loggers, _logger_beside(custom_stat_loggers)]
        stock(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    StatLoggerManager.__init__ = __init__  # type: ignore[method-assign]


def _logger_beside(loggers: list[Any]) -> type[KVCompressStatLogger]:
    """The one that reports to where these do. Nothing of Ray is loaded for it."""
    module = sys.modules.get("vllm.v1.metrics.ray_wrappers")
    if module is not None and module.RayPrometheusStatLogger in loggers:
        from kvcompress_vllm.integration.frontend.ray_metrics import KVCompressRayStatLogger

        return KVCompressRayStatLogger
    return KVCompressStatLogger


class KVCompressStatLogger(AggregateStatLoggerBase):
    """One per front end; vLLM builds it only where it keeps statistics."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        self.model_name = vllm_config.model_config.served_model_name
        self.history = History(engine_indexes or [0], time.time())
        self._metrics = self._create_metrics()
        for engine in engine_indexes or [0]:
            for metric in METRICS:
                for value in metric.values or (None,):
                    # Every series starts at 0 rather than with its first event.
                    labels = [] if value is None else [value]
                    self._metrics[metric.name].labels(self.model_name, str(engine), *labels)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None:
            return
        report = getattr(scheduler_stats, "kv_compress", None)
        if report is None:
            logger.warning_once(
                "kv_compress: vLLM's statistics arrive without ours; kv_compress metrics stand "
                "still (this process decoded statistics of another engine before)"
            )
            return
        self._record(report, str(engine_idx))
        self.history.record(engine_idx, report, time.time())

    def log_engine_initialized(self) -> None:
        pass

    def _create_metrics(self) -> dict[str, Any]:
        # As with vLLM's own metrics, the latest engine of a process takes the names over.
        while _registered:
            REGISTRY.unregister(_registered.pop())
        return {metric.name: _create(metric) for metric in METRICS}

    def _record(self, report: StepReport, engine: str) -> None:
        def of(name: str, *labels: str) -> Any:
            return self._metrics[name].labels(self.model_name, engine, *labels)

        for item in report.compressions:
            of(metrics.COMPRESSED_REQUESTS).inc(item.first)
            of(metrics.COMPRESSIONS, item.trigger).inc()
            of(metrics.KEPT_RATIO, item.trigger).observe(item.kept / item.candidates)
            of(metrics.FREED_BLOCKS).inc(item.before - item.after)
            of(metrics.BLOCKS_BEFORE).inc(item.before)
            of(metrics.BLOCKS_AFTER).inc(item.after)
            of(metrics.BYTES_BEFORE).inc(item.before * report.block_bytes)
            of(metrics.BYTES_AFTER).inc(item.after * report.block_bytes)
        for measured in report.measured:
            of(metrics.COMPRESSION_SECONDS, measured.trigger).observe(measured.milliseconds / 1e3)
            of(metrics.SCORE_MASS_LOST, measured.trigger).observe(measured.lost)
        of(metrics.PREEMPTIONS).inc(report.preemptions)
        of(metrics.PREEMPTIONS_AVOIDED).inc(report.preemptions_avoided)
        of(metrics.RESERVE_WAITS).inc(report.reserve_waits)
        for reason, count in report.refusals.items():
            of(metrics.ADMISSION_REFUSALS, reason).inc(count)
        of(metrics.PACKED_REQUESTS).set(report.packed_requests)
        of(metrics.SAVED_BLOCKS).set(report.saved_blocks)
        of(metrics.OBSERVATION_SLOTS_USED).set(report.observation_slots_used)
        of(metrics.OBSERVATION_SLOTS).set(report.observation_slots)
        for packed, drafted, accepted in zip(
            metrics.PACKED, report.drafted, report.accepted, strict=True
        ):
            of(metrics.DRAFT_TOKENS, packed).inc(drafted)
            of(metrics.ACCEPTED_TOKENS, packed).inc(accepted)
        shared = report.shared
        of(metrics.SHARED_HITS).inc(shared.hits)
        of(metrics.SHARED_MISSES).inc(shared.misses)
        of(metrics.SHARED_TOKENS).inc(shared.tokens)
        of(metrics.SHARED_WAITS).inc(shared.waits)
        of(metrics.SHARED_CONTEXTS).set(shared.contexts)
        of(metrics.SHARED_BLOCKS).set(shared.blocks)
        of(metrics.SHARED_SAVED_BLOCKS).set(shared.saved_blocks)


def _create(metric: Metric) -> Counter | Gauge | Histogram:
    labels = LABELS if metric.label is None else (*LABELS, metric.label)
    created: Counter | Gauge | Histogram
    if metric.kind == "counter":
        created = Counter(metric.name, metric.help, labels)
    elif metric.kind == "gauge":
        # With several API servers, each reports in turn; vLLM's own gauges do the same.
        created = Gauge(metric.name, metric.help, labels, multiprocess_mode="mostrecent")
    else:
        created = Histogram(metric.name, metric.help, labels, buckets=metric.buckets)
    _registered.append(created)
    return created
