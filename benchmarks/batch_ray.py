# SPDX-License-Identifier: Apache-2.0
"""Rows per second of Ray Data against a plain ``LLM.generate`` of the same engine.

    python -m benchmarks.batch_ray --engines stock,8 --trace chat --num-prompts 512

Both answer the same requests, whose lengths come from ``benchmarks/traces``, with the same engine
arguments; each in a process of its own. Starts are not counted: the clock runs from when the engine
gets the first request to the last answer. One JSON line per run, and a table.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.offline import BLOCK_SIZE, SHAPE, STOCK, engine_parser, options, pool_blocks
from benchmarks.offline import run_alone as run_in_a_process
from benchmarks.server import TOKENIZER

TRACES = Path(__file__).parent / "traces"
WAYS = ("plain", "ray")


def main() -> None:
    parser = trace_parser("batch_ray", __doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        way, name = args.only.split(":", 1)
        print(json.dumps({"engine": name, "way": way, **measure(args, way, name)}), flush=True)
        return
    runs = []
    todo = [(n, w) for _ in range(args.repeats) for n in args.engines for w in WAYS]
    for name, way in tqdm(todo, unit="run"):
        lines = run_in_a_process("batch_ray", f"{way}:{name}")
        tqdm.write("\n".join(lines))
        if args.output:
            with args.output.open("a") as file:
                file.write("\n".join(lines) + "\n")
        runs += map(json.loads, lines)
    print(f"{'engine':>24} {'plain rows/s':>14} {'Ray Data rows/s':>16} {'Ray / plain':>12}")
    for name in args.engines:
        plain, ray = (
            statistics.median(
                run["rows_per_s"] for run in runs if (run["engine"], run["way"]) == (name, way)
            )
            for way in WAYS
        )
        print(f"{name:>24} {plain:14.2f} {ray:16.2f} {ray / plain:12.3f}")


def trace_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Options of the benchmarks that draw their requests from a trace."""
    parser = engine_parser(module, description, engines=f"{STOCK},8")
    parser.add_argument("--trace", default="chat", help="a name in benchmarks/traces, or a file")
    parser.add_argument("--num-prompts", type=int, default=512)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on all lengths")
    parser.add_argument("--max-model-len", type=int, default=32768, help="longer requests are cut")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64, help="rows that Ray sends together")
    parser.add_argument(
        "--engine-args", type=json.loads, default={}, help='JSON: {"dtype": "float32"}'
    )
    return parser


def draw(args: argparse.Namespace) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of every request; the same for all engines.

    Raises:
        SystemExit: the trace cannot be read.
    """
    path = Path(args.trace)
    path = path if path.suffix == ".csv" else TRACES / f"{args.trace}.csv"
    try:
        rows = [line.split(",") for line in path.read_text().splitlines()]
        lengths = [(int(given), int(answered)) for given, answered in rows[1:]]
    except (OSError, ValueError) as error:
        sys.exit(f"--trace {args.trace}: {error}; a CSV file with the columns input,output")
    choice = random.Random(0)
    drawn = []
    for given, answered in choice.choices(lengths, k=args.num_prompts):
        given, answered = (max(1, round(args.scale * length)) for length in (given, answered))
        answered = min(answered, args.max_model_len // 4)
        drawn.append((min(given, args.max_model_len - answered - BLOCK_SIZE), answered))
    return drawn


def tokens(number: int, length: int) -> list[int]:
    """The prompt of a request: random, so that none shares a prefix with another."""
    return random.Random(number).choices(range(1000, 4000), k=length)


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Of ``LLM`` and of Ray's engine alike, but for the model and for compression."""
    found: dict[str, Any] = {
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "tensor_parallel_size": args.tensor_parallel_size,
        "enable_prefix_caching": False,
        "block_size": BLOCK_SIZE,
    }
    if args.model is None:
        found |= {"load_format": "dummy", "tokenizer": str(TOKENIZER)}
        found["hf_overrides"] = {"vocab_size": 4096}
    if args.kv_tokens is not None:
        found["num_gpu_blocks_override"] = pool_blocks(args.kv_tokens)
    return {**found, **args.engine_args}


def measure(args: argparse.Namespace, way: str, name: str) -> dict[str, Any]:
    """Run one engine one way; what a line of results has beside both names."""
    requests = draw(args)
    seconds = (through_ray if way == "ray" else plain)(args, name, requests)
    total = sum(map(sum, requests))
    return {
        "trace": args.trace,
        "rows": len(requests),
        "seconds": seconds,
        "rows_per_s": len(requests) / seconds,
        "total_tokens_per_s": total / seconds,
    }


def plain(args: argparse.Namespace, name: str, requests: list[tuple[int, int]]) -> float:
    """Seconds that ``LLM.generate`` takes."""
    from vllm import SamplingParams

    from kvcompress_vllm import LLM

    llm = LLM(args.model or str(SHAPE), kv_compress=options(name), **engine_arguments(args))
    llm.generate(
        [{"prompt_token_ids": tokens(-1, 8)}],
        SamplingParams(temperature=0, max_tokens=1),
        use_tqdm=False,
    )
    start = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": tokens(i, given)} for i, (given, _) in enumerate(requests)],
        [
            SamplingParams(temperature=0, max_tokens=answered, ignore_eos=True)
            for _, answered in requests
        ],
    )
    seconds = time.perf_counter() - start
    check([len(output.outputs[0].token_ids) for output in outputs], requests)
    return seconds


def through_ray(args: argparse.Namespace, name: str, requests: list[tuple[int, int]]) -> float:
    """Seconds from when the engine got the first request to when the last answer is here. A request
    before, of one token, is not counted, as it is not in the other way."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from kvcompress_vllm.ray import engine_kwargs

    if not ray.is_initialized():
        # Stages of Ray Data wait for each other's logical CPUs where there are few.
        if running():
            ray.init()
        else:
            ray.init(num_cpus=16, num_gpus=gpus(args), include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    given = options(name)
    config = vLLMEngineProcessorConfig(
        model_source=args.model or str(SHAPE),
        engine_kwargs={
            **engine_arguments(args),
            **({} if given is None else engine_kwargs(**given)),
        },
        batch_size=args.batch_size,
        max_concurrent_batches=max(8, -(-2 * args.max_num_seqs // args.batch_size)),
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        from vllm.sampling_params import RequestOutputKind

        source = random.Random(int(row["number"]))
        ids = source.choices(range(1000, 4000), k=int(row["given"]))
        params = {
            "temperature": 0,
            "max_tokens": int(row["answered"]),
            "ignore_eos": True,
            # As LLM.generate has it; else vLLM makes an output of every token so far on each step.
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        return {"tokenized_prompt": ids, "sampling_params": params}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        arrived = row["metrics"]["arrival_time"]
        return {
            "number": row["number"],
            "answered": row["num_generated_tokens"],
            "arrived": arrived,
        }

    rows = [
        {"number": i, "given": a, "answered": b} for i, (a, b) in enumerate([(8, 1), *requests], -1)
    ]
    # The first one alone, and the others in blocks of a batch each.
    blocks = [
        rows[:1],
        *(rows[i : i + args.batch_size] for i in range(1, len(rows), args.batch_size)),
    ]
    processor = build_processor(config, preprocess=prepare, postprocess=finish)
    arrived, lengths = {}, {}
    data = ray.data.from_arrow([table(block) for block in blocks])
    with tqdm(total=len(requests)) as bar:
        for row in processor(data).iter_rows():
            if row["number"] >= 0:
                arrived[row["number"]], lengths[row["number"]] = row["arrived"], row["answered"]
                bar.update()
    seconds = time.time() - min(arrived.values())
    check([lengths[i] for i in range(len(requests))], requests)
    ray.shutdown()
    return seconds


def table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def running() -> bool:
    """Whether there is a cluster to join."""
    import os

    return "RAY_ADDRESS" in os.environ


def gpus(args: argparse.Namespace) -> int:
    """GPUs of a local cluster: those that are there, or pretended ones for engines on CPU."""
    import torch

    return max(torch.cuda.device_count(), args.tensor_parallel_size)


def check(lengths: list[int], requests: list[tuple[int, int]]) -> None:
    """Raise where an answer has not the length that was asked for."""
    if lengths != [answered for _, answered in requests]:
        raise RuntimeError("some answers are shorter than they were asked to be")


if __name__ == "__main__":
    main()
