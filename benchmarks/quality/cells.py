# SPDX-License-Identifier: Apache-2.0
"""The grid: one cell is a policy, an allocator, a ratio, a task and a length."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

FULL = "full"
"""The policy name of the control that keeps everything; it has one allocator and ratio 1."""
CONTROLS = (FULL, "streaming", "random")


class Cell(NamedTuple):
    """What is measured together."""

    policy: str
    allocator: str
    ratio: float
    task: str
    length: int


def grid(
    policies: Iterable[str],
    allocators: Iterable[str],
    ratios: Iterable[float],
    tasks: Iterable[str],
    lengths: Iterable[int],
) -> Iterator[Cell]:
    """Every cell, the controls first and always."""
    lengths, tasks, ratios = list(lengths), list(tasks), list(ratios)
    for task, length in product(tasks, lengths):
        yield Cell(FULL, "auto", 1.0, task, length)
    names = dict.fromkeys([*CONTROLS[1:], *policies])
    for policy, allocator in product(names, allocators):
        for ratio, task, length in product(ratios, tasks, lengths):
            yield Cell(policy, allocator, ratio, task, length)


def load(path: Path) -> dict[Cell, dict[str, Any]]:
    """What was measured before; a later line of a cell replaces an earlier one."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text().splitlines())
    return {Cell(*(line[field] for field in Cell._fields)): line for line in lines}


def interval(right: int, samples: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a share."""
    if not samples:
        return 0.0, 1.0
    z = 1.96
    share, spread = right / samples, z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / samples + spread / (4 * samples)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
