# SPDX-License-Identifier: Apache-2.0
"""Accuracy of policies, allocators and ratios on retrieval tasks, through the real engine.

    python -m benchmarks.quality --policies kv_compress,snapkv --ratios 4,8 --output results.jsonl

The question is in the prompt when it is compressed. The full cache, ``streaming`` and ``random``
are always measured beside the others, on the same samples. Results are written as they come; a run
with the same ``--output`` goes on where the last one ended. Tuning seeds by default: measure on
``--first-seed 100000`` once the choices are made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality import cells as grid
from benchmarks.quality.cells import Cell
from benchmarks.quality.measure import engine_of
from benchmarks.quality.report import plot, print_table

TINY = Path(__file__).parents[2] / "models" / "tiny"


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[float]:
    return [float(word) for word in words(text)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=TINY, help="default: the bundled model")
    parser.add_argument("--tasks", type=words, default=words("single,multikey,kv40,copy,qa"))
    parser.add_argument("--lengths", type=numbers, default=[1500.0], help="tokens")
    parser.add_argument("--policies", type=words, default=["kv_compress"])
    parser.add_argument("--allocators", type=words, default=["auto"])
    parser.add_argument("--ratios", type=numbers, default=[4.0, 8.0])
    parser.add_argument("--options", type=json.loads, default={}, help="further options, as JSON")
    parser.add_argument("--samples", type=int, default=50, help="per task, length and ratio")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--plot", type=Path, help="draw accuracy against ratio into this file")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths]
    wanted = list(
        dict.fromkeys(grid.grid(args.policies, args.allocators, args.ratios, args.tasks, lengths))
    )
    done = grid.load(args.output)
    missing = [cell for cell in wanted if done.get(cell, {}).get("samples", 0) < args.samples]
    settings = {
        "model": str(args.model), "options": args.options, "samples": args.samples,
        "first_seed": args.first_seed, "enforce_eager": args.enforce_eager,
    }  # fmt: skip
    with tqdm(total=len(wanted), initial=len(wanted) - len(missing), unit="cell") as bar:
        for _, group in groupby(sorted(missing, key=engine_of), key=engine_of):
            run_engine(list(group), settings, args.output, bar)
    results = grid.load(args.output)
    shown = [results[cell] for cell in wanted]
    print_table(shown)
    if args.plot:
        plot(shown, args.plot)


def run_engine(cells: list[Cell], settings: dict[str, object], output: Path, bar: tqdm) -> None:
    """Measure the cells of one engine in a process of its own, writing each as it is done."""
    command = [sys.executable, "-m", "benchmarks.quality.measure"]
    found = 0
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None
        json.dump({"cells": cells, "args": settings}, process.stdin)
        process.stdin.close()
        for line in process.stdout:
            if line.startswith('{"policy"'):
                with output.open("a") as file:
                    file.write(line)
                result = json.loads(line)
                bar.set_description(f"{result['policy']} {result['ratio']:g} {result['task']}")
                found += 1
                bar.update()
        if process.wait() or found != len(cells):
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            sys.exit(f"the engine ended with status {process.returncode}; {found} results kept")


if __name__ == "__main__":
    main()
