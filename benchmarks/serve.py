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
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.offline import BLOCK_SIZE, SHAPE, STOCK, engine_parser, pool_blocks

TOKENIZER = Path(__file__).parents[1] / "models" / "tiny"
VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
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
    parser.add_argument("--port", type=int, default=8123)
    args = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for name in args.engines:
        with server(args, name):
            for rate in args.rates.split(","):
                run = {"engine": name, "rate": float(rate)} | load(args, rate)
                runs.append(run)
                print(json.dumps(run), flush=True)
                if args.output:
                    with args.output.open("a") as file:
                        print(json.dumps(run), file=file)
    print_table(runs)
    if args.plot:
        from benchmarks.plots import plot_serve

        plot_serve(runs, args.plot)


@contextmanager
def server(args: argparse.Namespace, name: str) -> Iterator[None]:
    """A server that answers, until the block is left."""
    command = [
        *VLLM, "serve", args.model or str(SHAPE), "--served-model-name", "model",
        "--port", str(args.port), "--block-size", str(BLOCK_SIZE), "--no-enable-prefix-caching",
        "--max-model-len", str(args.input_len + args.output_len + 4 * BLOCK_SIZE),
    ]  # fmt: skip
    if args.model is None:
        command += ["--load-format", "dummy", "--tokenizer", str(TOKENIZER)]
        command += ["--hf-overrides", '{"vocab_size": 4096}']
    if args.kv_tokens is not None:
        command += ["--num-gpu-blocks-override", str(pool_blocks(args.kv_tokens))]
    if name != STOCK:
        command += ["--kv-compress", name if "=" in name else f"ratio={name}"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_ready(args.port, process)
            yield
        except BaseException:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(port: int, process: subprocess.Popen[bytes], limit: float = 600) -> None:
    """Return once the server answers.

    Raises:
        RuntimeError: it ended, or did not answer within ``limit`` seconds.
    """
    start = time.monotonic()
    while time.monotonic() - start < limit:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server did not answer within {limit:.0f} s")


def load(args: argparse.Namespace, rate: str) -> dict[str, Any]:
    """One run of ``vllm bench serve``; all requests must succeed."""
    before = preemptions(args.port)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *VLLM, "bench", "serve", "--backend", "openai", "--port", str(args.port),
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
        "preemptions": preemptions(args.port) - before,
    }


def preemptions(port: int) -> int:
    """The server's counter."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    values = [line.split()[-1] for line in lines if line.startswith("vllm:num_preemptions_total")]
    return sum(int(float(value)) for value in values)


def print_table(runs: list[dict[str, Any]]) -> None:
    print(f"{'engine':>16} {'req/s':>6}", *(f"{title:>10}" for title in COLUMNS.values()))
    for run in runs:
        values = (
            f"{run[key]:10.0f}" if run[key] >= 100 else f"{run[key]:10.1f}" for key in COLUMNS
        )
        print(f"{run['engine']:>16} {run['rate']:6g}", *values)


if __name__ == "__main__":
    main()
