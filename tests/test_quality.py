# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from benchmarks.quality.cells import FULL, Cell, grid, interval, load
from benchmarks.quality.report import summary


def test_the_grid_always_holds_the_controls() -> None:
    cells = list(grid(["snapkv"], ["auto", "global"], [4, 8], ["single"], [1500]))
    assert cells[0] == Cell(FULL, "auto", 1.0, "single", 1500)
    assert len(cells) == 1 + 3 * 2 * 2 and len(set(cells)) == len(cells)
    assert {cell.policy for cell in cells} == {FULL, "streaming", "random", "snapkv"}


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert load(path) == {}
    cell = Cell("snapkv", "auto", 4.0, "single", 1500)
    lines = [cell._asdict() | {"right": right, "samples": 10} for right in (3, 7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load(path) == {cell: lines[1]}


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    # Newcombe 1998, table I: the score interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (29, 29, 0.8830, 1.0)],
)  # fmt: skip
def test_wilson_interval(right: int, samples: int, low: float, high: float) -> None:
    assert interval(right, samples) == pytest.approx((low, high), abs=1e-4)


def test_summary_adds_tasks_and_puts_the_best_first() -> None:
    def line(policy: str, task: str, right: int) -> dict:
        return Cell(policy, "auto", 4.0, task, 1500)._asdict() | {"right": right, "samples": 10}

    rows = summary([line("a", "x", 1), line("a", "y", 2), line("b", "x", 4), line("b", "y", 5)])
    assert rows == [("b", "auto", 4.0, 9, 20), ("a", "auto", 4.0, 3, 20)]
