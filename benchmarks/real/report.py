# SPDX-License-Identifier: Apache-2.0
"""Tables of what was measured: shares of answers with Wilson's intervals, nats per token lost."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.intervals import interval
from benchmarks.real.formats import AUTO

FULL = "full"

Line = Mapping[str, Any]


def load(paths: Iterable[Path]) -> list[Line]:
    """Every line of these files."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@dataclass
class Cell:
    """Answers and texts of one policy at one ratio. Keys say which sample and task."""

    right: dict[tuple[Any, ...], int] = field(default_factory=dict)
    likelihood: dict[tuple[Any, ...], float] = field(default_factory=dict)
    nats: dict[tuple[Any, ...], float] = field(default_factory=dict)

    def add(self, line: Line, tasks: Iterable[str] | None) -> None:
        """Count a line in."""
        key = (line["source"], line["length"], line["seed"])
        if "nats" in line:
            self.nats[key] = line["nats"]
        for task, (right, likelihood) in line.get("tasks", {}).items():
            if tasks is None or task in tasks:
                self.right[(*key, task)] = right
                self.likelihood[(*key, task)] = likelihood

    def accuracy(self) -> float:
        """Share of answers that are right."""
        return sum(self.right.values()) / max(1, len(self.right))

    def share(self, full: Cell) -> tuple[float, float, float]:
        """Of the full cache's accuracy on the same questions, with its 95% interval.

        The interval is that of a ratio of means over contexts (delta method): questions of one
        context share its keys.
        """
        mine: dict[Any, float] = defaultdict(float)
        theirs: dict[Any, float] = defaultdict(float)
        for key in self.right.keys() & full.right.keys():
            mine[key[:-1]] += self.right[key]
            theirs[key[:-1]] += full.right[key]
        total = sum(theirs.values())
        if not total:
            return math.nan, math.nan, math.nan
        share = sum(mine.values()) / total
        n = len(theirs)
        if n < 2:
            return share, 0.0, math.inf
        spread = stdev(mine[key] - share * theirs[key] for key in theirs)
        half = 1.96 * spread * math.sqrt(n) / total
        return share, share - half, share + half

    def lost(self, full: Cell) -> tuple[float, float]:
        """Nats per token lost on the same texts: mean, and half of its 95% interval."""
        gaps = [self.nats[key] - full.nats[key] for key in self.nats.keys() & full.nats.keys()]
        if len(gaps) < 2:
            return (gaps[0] if gaps else math.nan), math.inf
        return mean(gaps), 1.96 * stdev(gaps) / math.sqrt(len(gaps))


Group = tuple[Any, ...]
SHIELDS = ("page", "recent", "floor", "min_budget", "page_dtype")


def cells(
    lines: Iterable[Line], by: Iterable[str], tasks: Iterable[str] | None = None
) -> dict[Group, dict[tuple[Any, ...], dict[float, Cell]]]:
    """By group, then by policy and shields, then by ratio. The full cache is in every group, under
    its name alone."""
    by = list(by)
    found: dict[Group, dict[tuple[Any, ...], dict[float, Cell]]] = {}
    for line in lines:
        group = tuple(line[name] for name in by)
        row = (line["policy"],)
        if line["policy"] != FULL:
            row += tuple(line.get(name, AUTO) for name in SHIELDS)
        cell = found.setdefault(group, {}).setdefault(row, {}).setdefault(line["ratio"], Cell())
        cell.add(line, tasks)
    return found


def print_table(lines: Iterable[Line], args: Any) -> None:
    """Per group the full cache, then every policy, the best first at the middle ratio."""
    chosen = [
        line
        for line in lines
        if (not args.modes or line["mode"] in args.modes)
        and (not args.policies or line["policy"] in (FULL, *args.policies))
    ]
    for kind in ("tasks", "nats"):
        some = [line for line in chosen if kind in line]
        groups: dict[Group, list[Line]] = {}
        for line in some:
            groups.setdefault(tuple(line[name] for name in args.by), []).append(line)
        for group, members in groups.items():
            tasks = solved(members, args.least) if args.tasks is None else args.tasks
            rows = cells(members, args.by, tasks)[group]
            title = dict(zip(args.by, group, strict=True))
            if args.json:
                _print_lines(title, rows, tasks)
                continue
            _print_group(kind, title, rows, args.markdown, tasks)


def _print_lines(
    group: Mapping[str, Any],
    rows: Mapping[tuple[Any, ...], Mapping[float, Cell]],
    tasks: Iterable[str],
) -> None:
    """A JSON line per policy and ratio."""
    full = rows[(FULL,)][1.0]
    for row, by_ratio in rows.items():
        for ratio, cell in sorted(by_ratio.items()):
            line: dict[str, Any] = {**group, "policy": row[0], "ratio": ratio}
            line |= dict(zip(SHIELDS, row[1:], strict=False))
            if cell.right:
                share, low, high = cell.share(full)
                line |= {"questions": len(cell.right), "right": sum(cell.right.values())}
                line |= {"tasks": list(tasks), "interval": interval(line["right"], len(cell.right))}
                line |= {"share_of_full": [round(x, 4) for x in (share, low, high)]}
                line["interval"] = [round(x, 4) for x in line["interval"]]
                line["log_likelihood"] = round(mean(cell.likelihood.values()), 3)
            if cell.nats:
                line |= {"texts": len(cell.nats), "nats": round(mean(cell.nats.values()), 4)}
                line["lost"] = [round(x, 4) for x in cell.lost(full)]
            print(json.dumps(line))


def solved(lines: Iterable[Line], least: float) -> list[str]:
    """Tasks of which the full cache answers at least this share."""
    full: dict[str, list[int]] = {}
    for line in lines:
        if line["policy"] == FULL:
            for task, (right, _) in line.get("tasks", {}).items():
                full.setdefault(task, []).append(right)
    return [task for task, right in full.items() if mean(right) >= least]


def _print_group(
    kind: str,
    group: Mapping[str, Any],
    rows: Mapping[tuple[Any, ...], Mapping[float, Cell]],
    markdown: bool,
    tasks: Iterable[str],
) -> None:
    full = rows[(FULL,)][1.0]
    title = ", ".join(f"{name} {value}" for name, value in group.items())
    if kind == "tasks":
        low, high = interval(sum(full.right.values()), len(full.right))
        print(
            f"\n{title}: {len(full.right)} questions, full cache {full.accuracy():.3f} "
            f"({low:.2f} to {high:.2f}), {mean(full.likelihood.values()):.2f} nats an answer; "
            f"{', '.join(tasks)}"
        )
    else:
        print(f"\n{title}: {len(full.nats)} texts, full cache {mean(full.nats.values()):.3f}")
    others = {row: cell for row, cell in rows.items() if row != (FULL,)}
    ratios = sorted({ratio for row in others.values() for ratio in row})
    alike = {name: {row[1 + i] for row in others} for i, name in enumerate(SHIELDS)}
    shown = [i for i, name in enumerate(SHIELDS) if len(alike[name]) > 1]

    def worth(item: tuple[tuple[Any, ...], Mapping[float, Cell]]) -> float:
        cell = item[1].get(ratios[len(ratios) // 2])
        if cell is None:
            return math.inf
        return -cell.accuracy() if kind == "tasks" else cell.lost(full)[0]

    bar, ends = (" | ", "| ") if markdown else ("  ", "")
    heads = [f"ratio {ratio:g}" for ratio in ratios]
    if markdown:
        print(f"| policy | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    else:
        print(f"{'policy':34}" + bar + bar.join(f"{head:>25}" for head in heads))
    for row, cell in sorted(others.items(), key=worth):
        name = ", ".join([row[0], *(f"{SHIELDS[i]} {row[1 + i]}" for i in shown)])
        parts = [_cell(kind, cell[r], full) if r in cell else "" for r in ratios]
        if not markdown:
            name, parts = f"{name:34}", [f"{part:>25}" for part in parts]
        print(ends + bar.join([name, *parts]) + (" |" if markdown else ""))


def _cell(kind: str, cell: Cell, full: Cell) -> str:
    if kind == "nats":
        lost, half = cell.lost(full)
        return f"{lost:.4f} +- {half:.4f}"
    share, low, high = cell.share(full)
    likelihood = mean(cell.likelihood.values()) if cell.likelihood else math.nan
    return f"{share:.2f} ({low:.2f}-{high:.2f}) {likelihood:6.2f}"
