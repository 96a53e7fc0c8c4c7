# SPDX-License-Identifier: Apache-2.0
"""The text of ``/metrics``, read: vLLM's metrics and ours, by engine. No vLLM is needed for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Metrics = Mapping[tuple[str, str], float]
"""By name and, where a metric of ours has one, the value of its own label."""
EVERYWHERE = ""
"""In place of an engine: what belongs to the process."""


def parse(text: str) -> dict[str, Metrics]:
    """Prometheus' text format; what it holds of vLLM's and ours, by engine.

    Raises:
        ValueError: it is something else.
    """
    from prometheus_client.parser import text_string_to_metric_families  # vLLM brings it

    found: dict[str, dict[tuple[str, str], float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for name, labels, value, *_ in family.samples:
                if name.startswith(("vllm:", "kv_compress:")) and "le" not in labels:
                    own = (labels[k] for k in ("trigger", "reason", "packed") if k in labels)
                    key = name, next(own, "")
                    if name == "vllm:cache_config_info":
                        key, value = (name, ""), float(labels.get("num_gpu_blocks", 0) or 0)
                elif name == "process_start_time_seconds":
                    key = name, ""
                else:
                    continue
                engine = found.setdefault(labels.get("engine", EVERYWHERE), {})
                engine[key] = engine.get(key, 0.0) + value
    except ValueError as error:
        raise ValueError(f"/metrics is not in Prometheus' format: {error}") from error
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def summed(engines: Iterable[Metrics]) -> dict[tuple[str, str], float]:
    """Of all engines."""
    found: dict[tuple[str, str], float] = {}
    for engine in engines:
        for key, value in engine.items():
            found[key] = found.get(key, 0.0) + value
    return found


class Told:
    """Look-ups in two sets of metrics."""

    def __init__(self, now: Metrics, before: Metrics | None, options: Mapping[str, str]) -> None:
        self._now, self._before, self.options = now, before, options

    def __call__(self, name: str, label: str = "") -> float:
        name = name if name.startswith("vllm:") else f"kv_compress:{name}"
        return self._now.get((name, label), 0.0)

    def rises(self, name: str, label: str = "") -> bool:
        """Whether it did between the two looks; without a first one, since the start."""
        if self._before is None:
            return self(name, label) > 0
        return self(name, label) > self._before.get((f"kv_compress:{name}", label), 0.0)

    def mean(self, name: str, label: str) -> float | None:
        """Of a histogram."""
        count = self(f"{name}_count", label)
        return self(f"{name}_sum", label) / count if count else None

    def finished(self) -> float:
        """Requests that ended, however."""
        return sum(v for (name, _), v in self._now.items() if name == "vllm:request_success_total")

    def number(self, option: str) -> float | None:
        """Of the server's options; None where it is unknown or no number."""
        try:
            return float(self.options[option])
        except (KeyError, ValueError):
            return None
