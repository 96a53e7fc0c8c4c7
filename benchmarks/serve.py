# SPDX-License-Identifier: Apache-2.0
"""Latency and throughput over HTTP at several request rates, stock vLLM and several ratios.

    python -m benchmarks.serve --engines stock,1,8 --rates 1,2,4,inf --num-prompts 128

Starts ``vllm serve`` for every engine in turn and loads it with ``vllm bench serve``: random
prompts that share nothing, Poisson arrivals. Without ``--model`` it serves random weights of the
Llama-3.1-8B shape, with the vocabulary of the bundled model so that its tokenizer fits. One JSON
line per engine and rate, a table, and with ``--plot`` a figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.offline import BLOCK_SIZE, STOCK, engine_parser
from benchmarks.server import TOKENIZER, VLLM, Server, serve

PREEMPTIONS = "vllm:num_preemptions_total"
COLUMNS = {
    "median_ttft_ms": "TTFT p50",
    "p99_ttft_ms": "p99 ms",
    "median_itl_ms": "ITL p50",
    "p99_itl_ms": "p99 ms",
    "total_token_throughput": "tok/s",
    "preemptions": "preempted",
}


def main() -> None:
    parser = engine_parser("serve", __doc__, engines=f"{STOCK},1,8")
    parser.add_argument("--rates", default="1,2,4,inf", help="requests per second, comma-separated")
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--input-len", type=int, default=6000, help="tokens")
    parser.add_argument("--output-len", type=int, default=500, help="tokens")
    parser.add_argument("--port", type=int, help="default: any free one")
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for name in args.engines:
        length = args.input_len + args.output_len + 4 * BLOCK_SIZE
        flags = ["--no-enable-prefix-caching"]
        with serve(args.model, name, length, args.kv_tokens, flags, args.port) as server:
            for rate in args.rates.split(","):
                run = {"engine": name, "rate": float(rate)} | load(args, server, rate)
                runs.append(run)
                print(json.dumps(run), flush=True)
                if args.output:
                    with args.output.open("a") as file:
                        print(json.dumps(run), file=file)
    print_table(runs)
    if args.plot:
        from benchmarks.plots import plot_serve

        plot_serve(runs, args.plot)


def load(args: argparse.Namespace, server: Server, rate: str) -> dict[str, Any]:
    """One run of ``vllm bench serve``; all requests must succeed."""
    before = server.metrics()[PREEMPTIONS]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *VLLM, "bench", "serve", "--backend", "openai", "--port", str(server.port),
            "--model", "model", "--tokenizer", str(args.model or TOKENIZER),
            "--dataset-name", "random", "--random-input-len", str(args.input_len),
            "--random-output-len", str(args.output_len), "--num-prompts", str(args.num_prompts),
            "--request-rate", rate, "--ignore-eos", "--disable-tqdm", "--seed", "0",
            "--num-warmups", "2", "--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result",
            "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        result = json.loads((Path(folder) / "result.json").read_text())
    if result["completed"] != args.num_prompts:
        raise RuntimeError(f"{result['completed']} of {args.num_prompts} requests completed")
    kept = {key: result[key] for key in COLUMNS if key in result}
    return kept | {
        "duration": result["duration"],
        "median_tpot_ms": result["median_tpot_ms"],
        "preemptions": int(server.metrics()[PREEMPTIONS] - before),
    }


def print_table(runs: list[dict[str, Any]]) -> None:
    print(f"{'engine':>16} {'req/s':>6}", *(f"{title:>10}" for title in COLUMNS.values()))
    for run in runs:
        values = (
            f"{run[key]:10.0f}" if run[key] >= 100 else f"{run[key]:10.1f}" for key in COLUMNS
        )
        print(f"{run['engine']:>16} {run['rate']:6g}", *values)


if __name__ == "__main__":
    main()
