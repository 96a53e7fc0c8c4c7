# SPDX-License-Identifier: Apache-2.0
"""Quality of answers under compression, through the real engine.

    python -m benchmarks.quality --policies kv_compress,snapkv --ratios 4,8 --output results.jsonl
    python -m benchmarks.quality --policies all --questions visible,hidden --tasks ruler,perplexity
    python -m benchmarks.quality --vary window=2,8,32 --vary pool=1,15   # choose defaults
    python -m benchmarks.quality --merge results.*.jsonl --plot accuracy.png

Each cell is a policy, an allocator, a ratio, a question mode, varied options, a task and a length.
The full cache, ``streaming`` and ``random`` are always measured beside the others, on the same
samples. With the question ``visible`` the whole prompt is compressed; ``hidden``, what stands
before the question is, and the question is read over it; ``decoded``, the engine is made to
generate everything but the first tokens, context and question, and compresses it on the way as it
does any generation. ``perplexity`` is the loss on natural text (nats per token of its last 256)
after what stands before was compressed; where it is ``decoded``, those are compressed, too.

Results are written as they come; a run with the same ``--output`` goes on where the last one ended,
and a larger ``--samples`` adds to it. What the engines log goes to a file beside it, ``.log``.
Tuning seeds by default: measure on ``--first-seed 100000`` once the choices are made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from itertools import chain, product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.quality import cells as grid
from benchmarks.quality.cells import PERPLEXITY, QUESTIONS, Cell
from benchmarks.quality.measure import Settings, by_engine
from benchmarks.quality.prompts import TINY, check_tasks
from benchmarks.quality.report import heat_map, plot, print_tables
from benchmarks.retrieval import TASKS
from kvcompress_vllm import policies
from kvcompress_vllm.config.spelling import parse_spec

GROUPS = {
    "all": list(TASKS),
    "ruler": ["single", "multikey", "multivalue", "multiquery", "vt1", "vt2", "kv40", "fwe", "qa"],
}
EQUAL = {"sinks": 4, "recent": 32, "min_tokens_per_head": 16}
"""Shields of all policies alike: room for the longest window that one of them keeps whole."""

MOST_SHOWN = 120
"""Lines of an engine's failure; the rest is in the log."""
_PROCESS = re.compile(r"\(\S+ pid=\d+\)")


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def numbers(text: str) -> list[float]:
    return [float(word) for word in words(text)]


def shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 1 <= I <= N, like 2/4")
    return int(found[1]), int(found[2])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=str(TINY), help="default: the bundled model")
    parser.add_argument(
        "--tasks",
        type=words,
        default=words("single,multikey,kv40,copy,qa"),
        help=f"of benchmarks/retrieval, {PERPLEXITY}, or {', '.join(GROUPS)}",
    )
    parser.add_argument("--lengths", type=numbers, default=[1500.0], help="tokens")
    parser.add_argument("--policies", type=words, default=["kv_compress"], help="or all")
    parser.add_argument("--allocators", type=words, default=["auto"])
    parser.add_argument("--ratios", type=numbers, default=[4.0, 8.0])
    parser.add_argument("--questions", type=words, default=["visible"], help=", ".join(QUESTIONS))
    parser.add_argument(
        "--vary", action="append", default=[], metavar="OPTION=VALUE,...",
        help="measure each of these values; several: all combinations",
    )  # fmt: skip
    parser.add_argument("--options", default="", help="key=value,... common to all cells")
    parser.add_argument(
        "--shields",
        choices=("equal", "own"),
        default="equal",
        help="own: recent is what each policy prefers; equal: "
        + ", ".join(f"{key} {value}" for key, value in EQUAL.items()),
    )
    parser.add_argument("--longbench", type=Path, nargs="+", default=[], metavar="FILE.jsonl",
                        help="ask the rows of these files, too")  # fmt: skip
    parser.add_argument("--templates", type=Path, help="JSON, see benchmarks/quality/longbench.py")
    parser.add_argument("--samples", type=int, default=50, help="per task, length and choice")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--llm", type=json.loads, default={}, metavar="JSON",
                        help='more arguments of the engine, like {"dtype": "float32"}')  # fmt: skip
    parser.add_argument("--shard", type=shard, metavar="I/N",
                        help="measure the I-th of N parts, into a file of its own")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"))
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE",
                        help="measure nothing, report what these files hold together")  # fmt: skip
    parser.add_argument("--plot", type=Path, help="draw score against ratio into this file")
    parser.add_argument("--heat-map", type=Path,
                        help="record the pages kept per layer and head, and draw them")  # fmt: skip
    return parser


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    try:
        results = merged(args.merge) if args.merge else run(args)
        print_tables(results)
        if args.plot:
            plot(results, args.plot)
        if args.heat_map:
            heat_map(results, args.heat_map)
    except ValueError as error:
        parser.error(str(error))


def merged(files: list[Path]) -> dict[Cell, grid.Result]:
    """What several files hold together.

    Raises:
        ValueError: a file is missing, or they do not belong together.
    """
    for file in files:
        if not file.exists():
            raise ValueError(f"--merge: there is no {str(file)!r}")
    return grid.load(files)


def run(args: argparse.Namespace) -> dict[Cell, grid.Result]:
    """Measure what is missing, and return the results of all wanted cells.

    Raises:
        ValueError: an argument that is not accepted.
    """
    settings = Settings(
        model=args.model,
        base=base_options(args),
        llm=args.llm,
        record=args.heat_map is not None,
        longbench=tuple(map(str, args.longbench)),
        templates=args.templates and str(args.templates),
    )
    rows = {name: len(found.rows) for name, found in settings.data_sets().items()}
    wanted = cells(args, list(rows))
    by_engine(wanted, settings.base)  # refuses bad options before any engine starts
    seeds = range(args.first_seed, args.first_seed + args.samples)
    run = {
        "model": Path(args.model).name,
        "dtype": args.llm.get("dtype", "auto"),
        "base": settings.base,
        "seeds": grid.kind_of_seeds(seeds),
    }
    output = args.output
    if args.shard:
        index, count = args.shard
        output = output.with_suffix(f".{index}of{count}{output.suffix}")
        wanted = part(wanted, settings.base, index, count)
    done = grid.load([output], run)
    missing: dict[Cell, list[int]] = {}
    for cell in wanted:
        known = done[cell].scores if cell in done else {}
        asked = range(min(args.samples, rows[cell.task])) if cell.task in rows else seeds
        if left := [seed for seed in asked if seed not in known]:
            missing[cell] = left
    with tqdm(total=sum(map(len, missing.values())), unit="sample", smoothing=0.05) as bar:
        for group in by_engine(missing, settings.base):
            run_engine({cell: missing[cell] for cell in group}, settings, run, output, bar)
    results = grid.load([output], run)
    return {cell: results[cell] for cell in wanted}


def base_options(args: argparse.Namespace) -> str:
    """Options common to all cells, as ``key=value,...``."""
    varied = {name.partition("=")[0] for name in args.vary}
    given = parse_spec(args.options)
    shields = EQUAL if args.shields == "equal" else {}
    own = [f"{key}={value}" for key, value in shields.items() if key not in varied | given.keys()]
    return ",".join([*own, *words(args.options)])


def cells(args: argparse.Namespace, data_sets: list[str]) -> list[Cell]:
    """The wanted cells.

    Args:
        data_sets: names of those in files, all of which are asked.

    Raises:
        ValueError: an unknown task, question mode or option.
    """
    tasks = [task for name in args.tasks for task in GROUPS.get(name, [name])]
    check_tasks(tasks, data_sets)
    for question in args.questions:
        if question not in QUESTIONS:
            raise ValueError(
                f"--questions {question!r} is not accepted; it must be one of "
                f"{', '.join(QUESTIONS)}"
            )
    kinds = [(task, int(length)) for task in tasks for length in args.lengths
             if task not in data_sets]  # fmt: skip
    kinds += [(name, 0) for name in data_sets]
    axes = []
    for text in args.vary:
        name, equals, values = text.partition("=")
        if not equals or not words(values):
            raise ValueError(f"--vary {text!r} is not accepted; it must be OPTION=VALUE,...")
        axes.append([f"{name}={value}" for value in words(values)])
    variants = [",".join(items) for items in product(*axes)]
    names = policies.BUILT_IN if args.policies == ["all"] else args.policies
    return list(grid.grid(names, args.allocators, args.ratios, args.questions, variants, kinds))


def part(wanted: list[Cell], base: str, index: int, count: int) -> list[Cell]:
    """Every ``count``-th choice of each engine, from the ``index``-th on."""
    in_order = chain.from_iterable(by_engine(wanted, base))
    choices = dict.fromkeys(cell.choice for cell in in_order)
    mine = {choice for i, choice in enumerate(choices) if i % count == index - 1}
    return [cell for cell in wanted if cell.choice in mine]


def run_engine(
    missing: dict[Cell, list[int]],
    settings: Settings,
    run: dict[str, Any],
    output: Path,
    bar: Any,
) -> None:
    """Measure the cells of one engine in a process of its own, writing each as it is done."""
    command = [sys.executable, "-m", "benchmarks.quality.measure"]
    found = 0
    log = output.with_suffix(".log")
    with (
        log.open("a+") as logged,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=logged, text=True
        ) as process,
    ):
        begin = logged.seek(0, os.SEEK_END)
        assert process.stdin is not None and process.stdout is not None
        # One that ended already says why in its log.
        with suppress(BrokenPipeError):
            given = {"missing": list(missing.items()), "settings": asdict(settings)}
            process.stdin.write(json.dumps(given))
            process.stdin.close()
        for text in process.stdout:
            if not text.startswith('{"policy"'):  # vLLM logs here, the engine core its failure
                logged.write(text)
                logged.flush()
                continue
            line = json.loads(text)
            with output.open("a") as file:
                file.write(json.dumps(run | line) + "\n")
            bar.set_description(f"{line['policy']} {line['ratio']:g} {line['question']}")
            found += len(line["scores"])
            bar.update(len(line["scores"]))
        if process.wait() or found != sum(map(len, missing.values())):
            logged.seek(begin)
            print(failure(logged.read().splitlines()), file=sys.stderr)
            sys.exit(
                f"the engine ended with status {process.returncode}; {found} results kept; "
                f"its log is {str(log)!r}"
            )


def failure(lines: list[str]) -> str:
    """What to show of the log of an engine that ended: the first traceback of one of vLLM's own
    processes, whose lines begin with ``(NAME pid=N)``; else the first of any; else the last lines.
    """
    traces = [i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    if not traces:
        return "\n".join(lines[-40:])
    begin = next((i for i in traces if _PROCESS.match(lines[i])), traces[0])
    process = _PROCESS.match(lines[begin])
    shown = [line for line in lines[begin:] if not process or line.startswith(process[0])]
    return "\n".join(shown[:MOST_SHOWN])


if __name__ == "__main__":
    main()
