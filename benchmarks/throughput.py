# SPDX-License-Identifier: Apache-2.0
"""Offline throughput under batch load, stock vLLM and several ratios side by side in one run.

    python -m benchmarks.throughput --kv-tokens 19300 --engines stock,4,16,64

Every engine runs in a process of its own, with vLLM's defaults, on random prompts of its own,
prefix caching off. Total throughput counts prompt and output tokens, as the published figures do.
Without ``--model`` it runs random weights of the Llama-3.1-8B shape. One JSON line per run; the
table at the end shows medians with their range, and ``--plot`` draws them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

from benchmarks.offline import STOCK, Workload, engine_parser, measure, run_alone


def main() -> None:
    parser = engine_parser("throughput", __doc__, engines=f"{STOCK},1,8,64")
    parser.add_argument(
        "--workloads",
        type=Workload.parse,
        nargs="+",
        default=[Workload(256, 6000, 500)],
        metavar="PROMPTSxINPUT+OUTPUT",
        help="default: 256x6000+500",
    )
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        measure(args, args.only, args.workloads)
        return
    runs: list[dict[str, Any]] = []
    for name in args.engines:
        lines = run_alone("throughput", name)
        print(*lines, sep="\n", flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write("\n".join(lines) + "\n")
        runs += map(json.loads, lines)
    for workload in args.workloads:
        print_table([run for run in runs if run["workload"] == str(workload)], str(workload))
    if args.plot:
        from benchmarks.plots import plot_throughput

        plot_throughput(runs, args.plot)


def print_table(runs: list[dict[str, Any]], workload: str) -> None:
    """Medians over the repeats of every engine, and their ratio to stock if it was measured."""
    print(f"\n{workload}")
    columns = f"{'engine':>24} {'total tok/s':>12} {'range':>15} {'x stock':>8}"
    print(f"{columns} {'running':>8} {'preempted':>9}")
    by_engine: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_engine.setdefault(run["engine"], []).append(run)

    def median(name: str) -> float:
        return statistics.median(run["total_tokens_per_s"] for run in by_engine[name])

    for name, repeats in by_engine.items():
        rates = [run["total_tokens_per_s"] for run in repeats]
        spread = f"{min(rates):.0f}-{max(rates):.0f}"
        times = f"{median(name) / median(STOCK):.2f}" if STOCK in by_engine else "-"
        running = max(run["most_running"] for run in repeats)
        preempted = statistics.median(run["preemptions"] for run in repeats)
        print(
            f"{name:>24} {median(name):12.0f} {spread:>15} {times:>8} {running:8d} {preempted:9.0f}"
        )


if __name__ == "__main__":
    main()
