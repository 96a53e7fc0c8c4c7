# SPDX-License-Identifier: Apache-2.0
"""Figures of the engine benchmarks, from their JSON lines.

python -m benchmarks.plots throughput|batch|serve|multiturn|generation|soak RESULTS.jsonl FIGURE.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.offline import STOCK

Runs = list[dict[str, Any]]


def plot_throughput(runs: Runs, path: Path) -> None:
    """Total throughput of every engine, one panel per workload; whiskers span the repeats."""
    workloads = _unique(run["workload"] for run in runs)
    figure, axes = plt.subplots(
        1, len(workloads), figsize=(1.5 + 4.5 * len(workloads), 3.5), squeeze=False
    )
    for axis, workload in zip(axes[0], workloads, strict=True):
        rates: dict[str, list[float]] = {}
        for run in runs:
            if run["workload"] == workload:
                rates.setdefault(run["engine"], []).append(run["total_tokens_per_s"])
        for place, (name, values) in enumerate(rates.items()):
            median = statistics.median(values)
            whiskers = [[median - min(values)], [max(values) - median]]
            color = "tab:gray" if name == STOCK else "tab:blue"
            axis.bar(place, median, yerr=whiskers, color=color, capsize=4)
            if STOCK in rates and name != STOCK:
                times = median / statistics.median(rates[STOCK])
                axis.annotate(f"{times:.2f}x", (place, median), ha="center", va="bottom")
        axis.set_xticks(range(len(rates)), [_label(name) for name in rates])
        axis.set_title(f"{workload} tokens")
        axis.margins(y=0.12)
    axes[0][0].set_ylabel("prompt and output tokens per second")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_batch(runs: Runs, path: Path) -> None:
    """Total throughput by trace, one panel each, and by way into the engine."""
    traces, ways = _unique(run["trace"] for run in runs), _unique(run["way"] for run in runs)
    engines = _unique(run["engine"] for run in runs)
    figure, axes = plt.subplots(1, len(traces), figsize=(1.5 + 4 * len(traces), 3.5), squeeze=False)
    width = 0.8 / len(engines)
    for axis, trace in zip(axes[0], traces, strict=True):
        for index, name in enumerate(engines):
            found = {r["way"]: r["total_tokens_per_s"] for r in runs
                     if (r["trace"], r["engine"]) == (trace, name)}  # fmt: skip
            places = [i + (index + 0.5) * width - 0.4 for i in range(len(ways))]
            heights = [found.get(way, 0) for way in ways]
            color = "tab:gray" if name == STOCK else None
            axis.bar(places, heights, width, label=_label(name), color=color)
        axis.set_xticks(range(len(ways)), ways)
        axis.set_title(trace)
    axes[0][0].set_ylabel("prompt and output tokens per second")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_serve(runs: Runs, path: Path) -> None:
    """Time to first token, inter-token latency and throughput against the request rate."""
    rates = _unique(run["rate"] for run in runs)
    place = {rate: index for index, rate in enumerate(rates)}
    panels = [
        ("median_ttft_ms", "p99_ttft_ms", "time to first token, ms"),
        ("median_itl_ms", "p99_itl_ms", "inter-token latency, ms"),
        ("total_token_throughput", None, "prompt and output tokens per second"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.8))
    for axis, (key, tail, title) in zip(axes, panels, strict=True):
        for name in _unique(run["engine"] for run in runs):
            mine = [run for run in runs if run["engine"] == name]
            x = [place[run["rate"]] for run in mine]
            (line,) = axis.plot(x, [run[key] for run in mine], marker="o", label=_label(name))
            if tail:
                axis.plot(x, [run[tail] for run in mine], ":", color=line.get_color())
                axis.set_yscale("log")
        axis.set_xticks(range(len(rates)), ["all at once" if math.isinf(r) else r for r in rates])
        axis.set_xlabel("requests per second")
        axis.set_title(title + (" (dotted: p99)" if tail else ""))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_multiturn(runs: Runs, path: Path) -> None:
    """Prefix cache hits and time to first token of every turn."""
    panels = [("hit_rate", "prefix cache hit rate"), ("ttft_p50_ms", "time to first token, ms")]
    several = len({run.get("output_tokens") for run in runs}) > 1
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    for axis, (key, title) in zip(axes, panels, strict=True):
        for run in runs:
            turns = [turn["turn"] for turn in run["turns"]]
            values = [turn[key] for turn in run["turns"]]
            name = run["engine"]
            label = "stock, no prefix caching" if name == "uncached" else _label(name)
            if several:
                label += f", answers of {run['output_tokens']}"
            axis.plot(turns, values, marker=".", label=label)
        axis.set_xlabel("turn")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_generation(runs: Runs, path: Path) -> None:
    """Blocks held against tokens generated."""
    _plot_pairs(runs, path, "blocks", "tokens generated", "blocks held")


def plot_soak(runs: Runs, path: Path) -> None:
    """Memory of the server against requests ended."""
    _plot_pairs(runs, path, "memory", "requests ended", "memory of the server, MiB")


def _plot_pairs(runs: Runs, path: Path, key: str, xlabel: str, ylabel: str) -> None:
    """One line per run through the (x, y) pairs of ``key``."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8))
    for run in runs:
        x, y = zip(*run[key], strict=True)
        axis.plot(x, y, label=_label(run["engine"]))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.set_ylim(bottom=0)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _label(name: str) -> str:
    return name.replace(",", "\n") if name == STOCK or "=" in name else f"ratio {name}"


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


PLOTS = {
    "throughput": plot_throughput,
    "batch": plot_batch,
    "serve": plot_serve,
    "multiturn": plot_multiturn,
    "generation": plot_generation,
    "soak": plot_soak,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("kind", choices=PLOTS)
    parser.add_argument("results", type=Path, help="JSON lines that the benchmark wrote")
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    lines = args.results.read_text().splitlines()
    PLOTS[args.kind]([json.loads(line) for line in lines], args.figure)


if __name__ == "__main__":
    main()
