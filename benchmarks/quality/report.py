# SPDX-License-Identifier: Apache-2.0
"""Tables and a figure of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import CONTROLS, FULL, interval

Results = Sequence[dict[str, Any]]


def summary(results: Results) -> list[tuple[str, str, float, int, int]]:
    """(policy, allocator, ratio, right, samples) over all tasks and lengths, best first."""
    sums: dict[tuple[str, str, float], list[int]] = {}
    for result in results:
        key = result["policy"], result["allocator"], result["ratio"]
        total = sums.setdefault(key, [0, 0])
        total[0] += result["right"]
        total[1] += result["samples"]
    rows = [(*key, right, samples) for key, (right, samples) in sums.items()]
    return sorted(rows, key=lambda row: (row[2], -row[3] / max(1, row[4])))


def print_table(results: Results) -> None:
    """Accuracy per task, and over all with its 95% confidence interval."""
    tasks = list(dict.fromkeys(result["task"] for result in results))
    print(f"{'ratio':>5} {'policy':>20} {'allocator':>9}   all   95% interval", end="")
    print("".join(f"{task[:9]:>10}" for task in tasks))
    for policy, allocator, ratio, right, samples in summary(results):
        low, high = interval(right, samples)
        print(f"{ratio:5g} {policy:>20} {allocator:>9} {right / samples:5.3f}", end="")
        print(f"  {low:.3f} to {high:.3f}", end="")
        for task in tasks:
            mine = [
                r
                for r in results
                if (r["policy"], r["allocator"], r["ratio"], r["task"])
                == (policy, allocator, ratio, task)
            ]
            share = sum(r["right"] for r in mine) / max(1, sum(r["samples"] for r in mine))
            print(f"{share:10.2f}" if mine else f"{'-':>10}", end="")
        print()


def plot(results: Results, path: Path) -> None:
    """Accuracy against ratio, one line per policy and allocator, bars of the 95% interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = summary(results)
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    full = [(right, samples) for policy, _, _, right, samples in rows if policy == FULL]
    if full:
        axis.axhline(full[0][0] / full[0][1], color="black", linewidth=1, label="full cache")
    ratios = sorted({row[2] for row in rows if row[0] != FULL})
    for policy, allocator in dict.fromkeys(row[:2] for row in rows if row[0] != FULL):
        mine = sorted(row for row in rows if row[:2] == (policy, allocator))
        x = [ratios.index(row[2]) for row in mine]
        y = [row[3] / row[4] for row in mine]
        bounds = [interval(row[3], row[4]) for row in mine]
        error = [
            [max(0.0, share - low) for share, (low, _) in zip(y, bounds, strict=True)],
            [max(0.0, high - share) for share, (_, high) in zip(y, bounds, strict=True)],
        ]
        style = ":" if policy in CONTROLS else "-"
        label = policy if allocator == "auto" else f"{policy}, {allocator}"
        axis.errorbar(x, y, yerr=error, marker="o", linestyle=style, capsize=3, label=label)
    axis.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
    axis.set_xlabel("ratio")
    axis.set_ylabel("whole answers right")
    axis.set_ylim(0, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=150)
