# SPDX-License-Identifier: Apache-2.0
"""Where the time goes of the next turn of long conversations: steps, and kernels by time.

    python -m benchmarks.turn --engines "stock;ratio=8,context_stride=256" --history 16000 --users 8

Every user has had a conversation (``--history`` tokens, an answer of ``--answer``) and says
``--new`` tokens more, all at the same time, with prefix caching. Measured is until everybody has a
first token: seconds without a profiler, in all and of every step, the middle one of ``--repeats``;
then, on conversations that are just as long, what ran on the GPU (on the CPU where there is none)
and for how long nothing did. Every engine runs in a process of its own. One JSON line per engine,
and tables of the kernels that take longest and of the longest pauses between kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.offline import STOCK, Workload, build, engine_parser, run_alone

KERNELS, PAUSES = 14, 6
"""Rows of the tables."""


def main() -> None:
    parser = engine_parser("turn", __doc__, engines=f"{STOCK};ratio=8,context_stride=256")
    parser.add_argument("--history", type=int, default=16000, help="tokens")
    parser.add_argument("--answer", type=int, default=200, help="tokens")
    parser.add_argument("--new", type=int, default=200, help="tokens")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-num-seqs", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only is not None:
        print(json.dumps({"engine": args.only, **measure(args, args.only)}), flush=True)
        return
    for name in args.engines:
        for line in run_alone("turn", name):
            print_table(json.loads(line))
            if args.output:
                with args.output.open("a") as file:
                    file.write(f"{line}\n")


def measure(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """A turn of all users, without and with the profiler."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the profiler sees its own process
    import torch
    from torch.profiler import ProfilerActivity, profile

    longest = Workload(args.users, args.history + args.answer + args.new, 16)
    llm = build(args, name, [longest], prefix_caching=True)
    choice = random.Random(0)
    on_gpu = torch.cuda.is_available()
    turn(llm, talked(llm, args, choice))  # warms up
    turns = sorted((turn(llm, talked(llm, args, choice)) for _ in range(args.repeats)), key=sum)
    steps = turns[args.repeats // 2]
    prompts = talked(llm, args, choice)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as profiled:
        turn(llm, prompts)
    kernels = []
    for event in profiled.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros and (not on_gpu or "CUDA" in str(event.device_type)):
            kernels.append([shortened(event.key), event.count, round(micros / 1000, 3)])
    kernels.sort(key=lambda row: -row[2])
    ran = [
        (event.time_range.start, event.time_range.end, shortened(event.name))
        for event in profiled.events()
        if on_gpu and "CUDA" in str(event.device_type)
    ]
    return {
        "history": args.history,
        "users": args.users,
        "seconds": round(sum(steps), 4),
        "of": [round(sum(steps), 4) for steps in turns],
        "steps": len(steps) - 1,
        "steps_ms": [round(1000 * step, 1) for step in steps],
        "pauses": pauses(ran)[:PAUSES],
        "kernels_ms": round(sum(row[2] for row in kernels), 2),
        "kernels": kernels[:KERNELS],
    }


def talked(llm: Any, args: argparse.Namespace, choice: random.Random) -> list[list[int]]:
    """Prompts of the next turn of conversations that were had now."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    said = [choice.choices(range(1000, 4000), k=args.history) for _ in range(args.users)]
    sampling = SamplingParams(
        temperature=0, max_tokens=args.answer, ignore_eos=True, detokenize=False
    )
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in said]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    return [
        [*tokens, *output.outputs[0].token_ids, *choice.choices(range(1000, 4000), k=args.new)]
        for tokens, output in zip(said, outputs, strict=True)
    ]


def pauses(ran: Sequence[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """Times at which nothing ran, longest first: milliseconds, what ran before and what behind.

    Args:
        ran: begin and end in microseconds, and a name; of several streams.
    """
    found, last, before = [], None, ""
    for begin, end, name in sorted(ran):
        if last is not None and begin > last:
            found.append((round((begin - last) / 1000, 3), before, name))
        if last is None or end > last:
            last, before = end, name
    return sorted(found, key=lambda pause: -pause[0])


def turn(llm: Any, prompts: list[list[int]]) -> list[float]:
    """Seconds until everybody has a token: to hand in the requests, then by step of the engine."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    at = [time.perf_counter()]
    for index, tokens in enumerate(prompts):
        engine.add_request(f"{at[0]}-{index}", TokensPrompt(prompt_token_ids=tokens), sampling)
    at.append(time.perf_counter())
    while engine.has_unfinished_requests():
        engine.step()
        at.append(time.perf_counter())
    return [end - begin for begin, end in pairwise(at)]


def shortened(name: str) -> str:
    """A kernel's name without its types and arguments."""
    name = re.sub(r"^void ", "", name)
    return re.split(r"[<(]", name)[0][:70] or name[:70]


def print_table(run: dict[str, Any]) -> None:
    print(
        f"{run['engine']}: {run['users']} users behind {run['history']} tokens: "
        f"{1000 * run['seconds']:.1f} ms in {run['steps']} steps "
        f"({' + '.join(map(str, run['steps_ms']))}); kernels {run['kernels_ms']} ms"
    )
    for name, count, millis in run["kernels"]:
        print(f"{millis:10.2f} ms {count:7d} x  {name}")
    for millis, before, behind in run["pauses"]:
        print(f"{millis:10.2f} ms without, between {before} and {behind}")


if __name__ == "__main__":
    main()
