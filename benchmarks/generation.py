# SPDX-License-Identifier: Apache-2.0
"""Blocks that one long generation holds, and its speed, token by token.

    python -m benchmarks.generation --engines "stock;budget_tokens=1024;ratio=8"

A prompt of 128 tokens and 8,000 generated ones, whatever the model thinks of them. Every engine
runs in a process of its own. One JSON line per engine, a table, and with ``--plot`` a figure.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

from benchmarks.offline import STOCK, Workload, build, engine_parser, run_alone

EVERY = 16
"""Tokens between two looks at the pool."""


def main() -> None:
    parser = engine_parser("generation", __doc__, engines=f"{STOCK};budget_tokens=1024;ratio=8")
    parser.add_argument("--input-len", type=int, default=128, help="tokens")
    parser.add_argument("--output-len", type=int, default=8000, help="tokens")
    parser.add_argument("--max-num-seqs", type=int, default=4, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps(measure(args, args.only)), flush=True)
        return
    runs = [json.loads(line) for name in args.engines for line in run_alone("generation", name)]
    if args.output:
        with args.output.open("a") as file:
            file.write("".join(f"{json.dumps(run)}\n" for run in runs))
    print_table(runs)
    if args.plot:
        from benchmarks.plots import plot_generation

        plot_generation(runs, args.plot)


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """One generation.

    Raises:
        RuntimeError: it ended early.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    llm = build(args, name, [Workload(1, args.input_len, args.output_len)])
    sampling = SamplingParams(
        max_tokens=args.output_len, ignore_eos=True, detokenize=False, seed=0,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    prompt = random.Random(0).choices(range(1000, 4000), k=args.input_len)
    llm.llm_engine.add_request("long", TokensPrompt(prompt_token_ids=prompt), sampling)
    num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1
    generated = 0
    blocks: list[tuple[int, int]] = []
    seconds = []
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        outputs = llm.llm_engine.step()
        seconds.append(time.perf_counter() - start)
        generated += sum(len(output.outputs[0].token_ids) for output in outputs)
        if generated >= len(blocks) * EVERY and llm.llm_engine.has_unfinished_requests():
            blocks.append((generated, round(used_share(llm) * num_blocks)))
    if generated != args.output_len:
        raise RuntimeError(f"{generated} of {args.output_len} tokens were generated")
    return {
        "engine": name,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "most_blocks": max(count for _, count in blocks),
        "blocks_at_end": blocks[-1][1],
        "seconds": round(sum(seconds), 2),
        "itl_first_quarter_ms": quarter(seconds, 0),
        "itl_last_quarter_ms": quarter(seconds, 3),
        "blocks": blocks,
    }


def used_share(llm: Any) -> float:
    """Share of the pool that is in use."""
    usage = [m.value for m in llm.get_metrics() if m.name == "vllm:kv_cache_usage_perc"]
    return sum(usage)


def quarter(seconds: list[float], part: int) -> float:
    """Median milliseconds per step of a quarter of the generation."""
    size = len(seconds) // 4
    return round(1000 * statistics.median(seconds[part * size : (part + 1) * size]), 2)


def print_table(runs: list[dict[str, Any]]) -> None:
    columns = ("most_blocks", "blocks_at_end", "seconds", "itl_first_quarter_ms",
               "itl_last_quarter_ms")  # fmt: skip
    print(f"{'engine':>20}", *(f"{column:>{len(column)}}" for column in columns))
    for run in runs:
        print(f"{run['engine']:>20}", *(f"{run[column]:>{len(column)}}" for column in columns))


if __name__ == "__main__":
    main()
