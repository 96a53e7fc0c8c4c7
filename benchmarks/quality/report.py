# SPDX-License-Identifier: Apache-2.0
"""Tables and figures of what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import (
    CONTROLS,
    FULL,
    PERPLEXITY,
    QUESTIONS,
    Cell,
    Choice,
    Result,
)

Results = Mapping[Cell, Result]
GROUPS = {
    "retrieval tasks": ("exact", "recall"),
    "LongBench": ("f1", "rouge_l", "class", "edit", "number"),
    PERPLEXITY: ("nats",),
}
"""Metrics that may be averaged with each other."""


def by_choice(results: Results, group: str) -> dict[Choice, Result]:
    """All tasks and lengths of a group together, the best first within a question and ratio."""
    together: dict[Choice, Result] = {}
    for cell, result in results.items():
        if result.metric in GROUPS[group]:
            total = together.setdefault(cell.choice, Result(result.metric))
            total.metric = result.metric if total.metric == result.metric else "several"
            for seed, score in result.scores.items():
                total.scores[cell.task, cell.length, seed] = score
    sign = 1 if group == PERPLEXITY else -1

    def key(choice: Choice) -> tuple[str, float, float]:
        return choice.question, choice.ratio, sign * together[choice].mean

    return {choice: together[choice] for choice in sorted(together, key=key)}


def label(choice: Choice) -> str:
    """Policy, and what of it is not its own choice."""
    allocator = "" if choice.allocator == "auto" else choice.allocator
    return ", ".join(filter(None, (choice.policy, allocator, choice.options)))


def print_tables(results: Results) -> None:
    """Per group of metrics: each task, and the mean over all samples with its 95% interval; for
    perplexity that of the difference from the full cache on the same texts."""
    for group in GROUPS:
        rows = by_choice(results, group)
        if not rows:
            continue
        tasks = dict.fromkeys(
            (cell.task, cell.length)
            for cell, result in results.items()
            if result.metric in GROUPS[group]
        )
        width = max(len(label(choice)) for choice in rows)
        loss = group == PERPLEXITY
        unit = "nats per token, interval of what is lost" if loss else "mean score"
        print(f"\n{group} ({unit})")
        names = [f"{task}@{length}" if length else task for task, length in tasks]
        widths = [max(6, len(name)) + 1 for name in names]
        print(f"{'question':8} {'ratio':>5} {'policy':{width}}    all  95% interval ", end="")
        print("".join(f"{name:>{w}}" for name, w in zip(names, widths, strict=True)))
        for choice, total in rows.items():
            full = rows.get(Choice(FULL))
            low, high = (total.minus(full) if loss and full else total).interval()
            print(f"{choice.question:8} {choice.ratio:5g} {label(choice):{width}}", end="")
            print(f" {total.mean:6.3f} {low:6.3f} {high:6.3f}", end="  ")
            for (task, length), w in zip(tasks, widths, strict=True):
                result = results.get(Cell(*choice, task, length))
                print(f"{result.mean:{w}.3f}" if result else f"{'-':>{w}}", end="")
            print()


def plot(results: Results, path: Path) -> None:
    """Score against ratio: a panel per group and question mode, a line per choice but for its
    ratio, bars of the 95% interval. Of perplexity, what is lost against the full cache."""
    plt = _pyplot()
    panels = [
        (group, question)
        for group in GROUPS
        for question in QUESTIONS
        if any(choice.question == question for choice in by_choice(results, group))
    ]
    lines = list(dict.fromkeys(_line(cell.choice) for cell in results if cell.policy != FULL))
    colors = plt.get_cmap("tab20").colors
    figure, axes = plt.subplots(
        1,
        max(1, len(panels)),
        squeeze=False,
        layout="constrained",
        figsize=(3 + 4.5 * max(1, len(panels)), 5),
    )
    for axis, (group, question) in zip(axes[0], panels, strict=False):
        rows = by_choice(results, group)
        full = rows.get(Choice(FULL))
        if full and group == PERPLEXITY:
            rows = {choice: total.minus(full) for choice, total in rows.items()}
        if full:
            level = rows[Choice(FULL)].mean
            axis.axhline(level, color="black", linewidth=1, label="full cache")
        ratios = sorted({choice.ratio for choice in rows if choice.policy != FULL})
        for index, line in enumerate(lines):
            mine = [
                (ratios.index(choice.ratio), total)
                for choice, total in sorted(rows.items())
                if _line(choice) == line and choice.question == question
            ]
            if not mine:
                continue
            means = [total.mean for _, total in mine]
            bounds = [total.interval() for _, total in mine]
            error = [
                [_length(mean - low) for mean, (low, _) in zip(means, bounds, strict=True)],
                [_length(high - mean) for mean, (_, high) in zip(means, bounds, strict=True)],
            ]
            aside = 0.3 * (index / max(1, len(lines) - 1) - 0.5)  # bars beside each other
            axis.errorbar(
                [place + aside for place, _ in mine],
                means,
                yerr=error,
                capsize=2,
                elinewidth=0.8,
                markersize=5,
                color=colors[index % len(colors)],
                marker="osv^D"[index // len(colors) % 5],
                linestyle=":" if line.policy in CONTROLS else "-",
                label=label(line),
            )
        axis.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axis.set_xlabel("ratio")
        axis.set_title(f"{group}, question {question}")
        axis.set_ylabel("nats per token lost" if group == PERPLEXITY else "mean score")
        if group != PERPLEXITY:
            axis.set_ylim(0, 1.03)
        axis.grid(alpha=0.3)
    entries: dict[str, Any] = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _line(choice: Choice) -> Choice:
    return choice._replace(ratio=0.0, question="")


def heat_map(results: Results, path: Path) -> None:
    """Share of pages kept per layer and head, mean over the recorded samples of all tasks: a row
    per policy, a column per ratio and question mode. Policies that treat all heads alike are named
    only.

    Raises:
        ValueError: nothing was recorded.
    """
    plt = _pyplot()
    maps = kept_maps(results)
    if not maps:
        raise ValueError("no result says what was kept; measure anew, with --heat-map")
    uneven = {_line(c) for c, kept in maps.items() if len({x for row in kept for x in row}) > 1}
    alike = list(dict.fromkeys(label(choice) for choice in maps if _line(choice) not in uneven))
    rows = [line for line in dict.fromkeys(map(_line, maps)) if line in uneven]
    rows = rows or [_line(next(iter(maps)))]
    columns = sorted(
        {(c.question, c.ratio) for c in maps}, key=lambda c: (QUESTIONS.index(c[0]), c)
    )
    layers, heads = len(next(iter(maps.values()))), len(next(iter(maps.values()))[0])
    width, height = max(1.5, heads * 0.12), max(1.1, layers * 0.08)
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        sharex=True,
        sharey=True,
        figsize=(2.5 + len(columns) * width, 1.3 + len(rows) * height),
        layout="constrained",
    )
    most = max(share for kept in maps.values() for heads_of in kept for share in heads_of)
    for line, row in zip(axes, rows, strict=True):
        for axis, (question, ratio) in zip(line, columns, strict=True):
            kept = maps.get(row._replace(ratio=ratio, question=question))
            if kept is None:
                axis.axis("off")
                continue
            image = axis.imshow(kept, vmin=0, vmax=most, cmap="viridis", aspect="auto")
            axis.set_xticks(range(0, heads, max(1, heads // 4)))
            axis.set_yticks(range(0, layers, max(1, layers // 4)))
        line[0].set_ylabel(label(row), fontsize=7)
    for axis, (question, ratio) in zip(axes[0], columns, strict=True):
        axis.set_title(f"{question}, {ratio:g}", fontsize=9)
    figure.colorbar(image, ax=axes, label="share of pages kept", shrink=min(1.0, 4 / len(rows)))
    even = f"\nall heads alike: {', '.join(alike)}" if alike else ""
    figure.supxlabel(f"KV head{even}", fontsize=8, wrap=True)
    figure.supylabel("layer", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def kept_maps(results: Results) -> dict[Choice, list[list[float]]]:
    """Mean share of pages kept, ``[L][H]``, by choice."""
    recorded: dict[Choice, list[tuple[int, list[list[float]]]]] = {}
    for cell, result in results.items():
        if result.kept:
            recorded.setdefault(cell.choice, []).extend(result.kept)
    return {choice: _weighted(maps) for choice, maps in recorded.items()}


def _weighted(maps: Iterable[tuple[int, list[list[float]]]]) -> list[list[float]]:
    maps = list(maps)
    total = sum(count for count, _ in maps)
    layers, heads = len(maps[0][1]), len(maps[0][1][0])
    return [
        [sum(count * kept[i][j] for count, kept in maps) / total for j in range(heads)]
        for i in range(layers)
    ]


def _length(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
