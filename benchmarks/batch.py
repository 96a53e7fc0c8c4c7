# SPDX-License-Identifier: Apache-2.0
"""Throughput of batch jobs whose requests are as long as real ones, by three ways into the engine.

    python -m benchmarks.batch --traces chat,code,documents --engines stock,2,8 --output batch.jsonl

``bench`` is ``vllm bench throughput``, ``ray`` is Ray Data, ``http`` is a server that gets all
requests at once from ``vllm bench serve``. Lengths come from ``benchmarks/traces``. Every run has a
process of its own; one JSON line each, a table, and with ``--plot`` a figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.batch_ray import draw, engine_arguments, measure, trace_parser
from benchmarks.offline import STOCK, run_alone
from benchmarks.server import TOKENIZER, VLLM, serve

WAYS = ("bench", "ray", "http")


def main() -> None:
    parser = trace_parser("batch", __doc__)
    parser.add_argument("--traces", default="chat,code,documents", help="instead of --trace")
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        args.trace, name = args.only.split(":", 1)
        print(json.dumps({"engine": name, "way": "ray", **measure(args, "ray", name)}), flush=True)
        return
    wrong = set(args.ways.split(",")) - set(WAYS)
    if wrong:
        parser.error(f"--ways: {', '.join(wrong)} is not one of {', '.join(WAYS)}")
    todo = [
        (trace, way, name)
        for trace in args.traces.split(",")
        for way in args.ways.split(",")
        for name in args.engines
    ]
    runs: list[dict[str, Any]] = []
    with tqdm(todo, unit="run") as bar:
        for args.trace, way, name in bar:
            bar.set_description(f"{args.trace} {way} {name}")
            runs.append(run(args, way, name))
            tqdm.write(json.dumps(runs[-1]))
            if args.output:
                with args.output.open("a") as file:
                    print(json.dumps(runs[-1]), file=file)
    print_table(runs)
    if args.plot:
        from benchmarks.plots import plot_batch

        plot_batch(runs, args.plot)


def run(args: argparse.Namespace, way: str, name: str) -> dict[str, Any]:
    """One engine, one trace, one way."""
    if way == "ray":
        found: dict[str, Any] = json.loads(run_alone("batch", f"{args.trace}:{name}")[0])
        return found
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.csv"
        write_burstgpt(trace, draw(args))
        found = (through_bench if way == "bench" else through_http)(args, name, trace)
    return {"engine": name, "way": way, "trace": args.trace, "rows": args.num_prompts, **found}


def write_burstgpt(path: Path, requests: list[tuple[int, int]]) -> None:
    """In the form of BurstGPT's files, of which vLLM's benchmarks take nothing but lengths."""
    columns = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    lines = (f"{i},GPT-4,{a},{b},{a + b},API log\n" for i, (a, b) in enumerate(requests))
    path.write_text(columns + "".join(lines))


def flags(args: argparse.Namespace) -> list[str]:
    """The engine's arguments as vLLM's command line takes them."""
    found = []
    for key, value in engine_arguments(args).items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            found.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            found += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return found


def through_bench(args: argparse.Namespace, name: str, trace: Path) -> dict[str, Any]:
    from benchmarks.offline import SHAPE

    result = trace.with_name("result.json")
    command = [
        *VLLM, "bench", "throughput", "--model", str(args.model or SHAPE),
        "--dataset-name", "burstgpt", "--dataset-path", str(trace),
        "--num-prompts", str(args.num_prompts), "--output-json", str(result), *flags(args),
    ]  # fmt: skip
    if name != STOCK:
        command += ["--kv-compress", name if "=" in name else f"ratio={name}"]
    # Its progress bar and its log go where ours do.
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"{name}: vllm bench throughput failed")
    told = json.loads(result.read_text())
    return {
        "seconds": told["elapsed_time"],
        "rows_per_s": told["requests_per_second"],
        "total_tokens_per_s": told["tokens_per_second"],
    }


def through_http(args: argparse.Namespace, name: str, trace: Path) -> dict[str, Any]:
    result = trace.with_name("result.json")
    own = ["--max-num-seqs", str(args.max_num_seqs), "--no-enable-prefix-caching",
           "--tensor-parallel-size", str(args.tensor_parallel_size)]  # fmt: skip
    for key, value in args.engine_args.items():
        own += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    with serve(args.model, name, args.max_model_len, args.kv_tokens, own) as server:
        command = [
            *VLLM, "bench", "serve", "--backend", "openai", "--port", str(server.port),
            "--model", "model", "--tokenizer", str(args.model or TOKENIZER),
            "--dataset-name", "burstgpt", "--dataset-path", str(trace),
            "--num-prompts", str(args.num_prompts), "--request-rate", "inf", "--ignore-eos",
            "--num-warmups", "1", "--save-result", "--result-dir", str(trace.parent),
            "--result-filename", result.name,
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
    told = json.loads(result.read_text())
    if told["completed"] != args.num_prompts:
        raise RuntimeError(f"{told['completed']} of {args.num_prompts} requests completed")
    return {
        "seconds": told["duration"],
        "rows_per_s": told["request_throughput"],
        "total_tokens_per_s": told["total_token_throughput"],
    }


def print_table(runs: list[dict[str, Any]]) -> None:
    """Throughput of every run, and its ratio to stock the same way."""
    columns = f"{'trace':>12} {'way':>6} {'engine':>16} {'rows/s':>8} {'tok/s':>9} {'x stock':>8}"
    print(columns)
    stock = {
        (run["trace"], run["way"]): run["total_tokens_per_s"]
        for run in runs
        if run["engine"] == STOCK
    }
    for run in runs:
        beside = stock.get((run["trace"], run["way"]))
        times = "-" if beside is None else f"{run['total_tokens_per_s'] / beside:.2f}"
        print(
            f"{run['trace']:>12} {run['way']:>6} {run['engine']:>16} {run['rows_per_s']:8.2f} "
            f"{run['total_tokens_per_s']:9.0f} {times:>8}"
        )


if __name__ == "__main__":
    main()
