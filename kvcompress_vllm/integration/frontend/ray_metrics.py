# SPDX-License-Identifier: Apache-2.0
"""Our metrics where Ray collects them: beside vLLM's, at the metrics port of every node.

Ray puts ``ray_`` before the names, and an underscore for the colon.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayGaugeWrapper, RayHistogramWrapper

from kvcompress_vllm.integration.frontend.prometheus import LABELS, KVCompressStatLogger
from kvcompress_vllm.reporting.metrics import METRICS, Metric


class KVCompressRayStatLogger(KVCompressStatLogger):
    """For engines in Ray Data and Ray Serve."""

    def _create_metrics(self) -> dict[str, Any]:
        return {metric.name: _create(metric) for metric in METRICS}


def _create(metric: Metric) -> RayCounterWrapper | RayGaugeWrapper | RayHistogramWrapper:
    labels = [*LABELS] if metric.label is None else [*LABELS, metric.label]
    if metric.kind == "counter":
        return RayCounterWrapper(metric.name.removesuffix("_total"), metric.help, labels)
    if metric.kind == "gauge":
        return RayGaugeWrapper(metric.name, metric.help, labels)
    return RayHistogramWrapper(metric.name, metric.help, labels, [*metric.buckets])
