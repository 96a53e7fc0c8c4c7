# SPDX-License-Identifier: Apache-2.0
"""Growing conversations over HTTP: prefix cache hits and time to first token, turn by turn.

    python -m benchmarks.multiturn --engines uncached,stock,1,4,8 --kv-tokens 100000

Several users talk at once, each at the pace of the answers. Every turn sends the whole conversation
so far: a prefix that all users share, a first message, and for each further turn the answer just
received and a new message. vLLM's prefix caching is on, except in ``uncached``, which is stock vLLM
without it. One JSON line per engine and length of answers, tables, and with ``--plot`` a figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import aiohttp

from benchmarks.offline import BLOCK_SIZE, STOCK, engine_parser
from benchmarks.server import Server, completion_chunks, serve

UNCACHED = "uncached"
TOKENS = range(1000, 4000)
PREEMPTED = "vllm:num_preemptions_total"


class Turn(NamedTuple):
    """One answer."""

    turn: int
    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    seconds: float


def main() -> None:
    parser = engine_parser("multiturn", __doc__, engines=f"{UNCACHED},{STOCK},1,4,8")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--shared-tokens", type=int, default=500, help="what all users begin with")
    parser.add_argument("--first-tokens", type=int, default=2000, help="of the first message")
    parser.add_argument("--turn-tokens", type=int, default=200, help="of every further message")
    parser.add_argument(
        "--output-tokens", default="200", help="of every answer; comma-separated: one after another"
    )
    parser.add_argument("serve_args", nargs="*", help="after --, further flags of vllm serve")
    args = parser.parse_args()
    args.output_tokens = [int(tokens) for tokens in args.output_tokens.split(",")]
    runs: list[dict[str, Any]] = []
    for name in args.engines:
        for run in measure(args, name):
            runs.append(run)
            print(json.dumps(run), flush=True)
            if args.output:
                with args.output.open("a") as file:
                    print(json.dumps(run), file=file)
    for tokens in args.output_tokens:
        print(f"answers of {tokens} tokens")
        print_table([run for run in runs if run["output_tokens"] == tokens])
    if args.plot:
        from benchmarks.plots import plot_multiturn

        plot_multiturn(runs, args.plot)


def measure(args: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    """All conversations on one engine, once for every length of answers.

    Raises:
        RuntimeError: a request failed or got less than all of its output.
    """
    longest = args.shared_tokens + args.first_tokens + args.turns * max(args.output_tokens)
    longest += (args.turns - 1) * args.turn_tokens + BLOCK_SIZE
    caching = "--no-enable-prefix-caching" if name == UNCACHED else "--enable-prefix-caching"
    flags = [caching, "--enable-prompt-tokens-details", *args.serve_args]
    engine = STOCK if name == UNCACHED else name
    with serve(args.model, engine, longest, args.kv_tokens, flags) as server:
        # Kernels, first compression.
        asyncio.run(talk(args, server, args.output_tokens[0], users=1, turns=2, seed=-1))
        for seed, tokens in enumerate(args.output_tokens):
            before = server.metrics()
            start = time.perf_counter()
            turns = asyncio.run(talk(args, server, tokens, args.users, args.turns, seed))
            seconds = time.perf_counter() - start
            preempted = server.metrics()[PREEMPTED] - before[PREEMPTED]
            yield {
                "engine": name,
                "users": args.users,
                "kv_tokens": args.kv_tokens,
                "output_tokens": tokens,
                "seconds": round(seconds, 2),
                "preemptions": int(preempted),
                "turns": [summary([t for t in turns if t.turn == n]) for n in range(args.turns)],
            }


def summary(turns: list[Turn]) -> dict[str, Any]:
    """One turn of all users."""
    first = [turn.first_token_s for turn in turns]
    prompt = sum(turn.prompt_tokens for turn in turns)
    return {
        "turn": turns[0].turn + 1,
        "prompt_tokens": round(prompt / len(turns)),
        "hit_rate": round(sum(turn.cached_tokens for turn in turns) / prompt, 4),
        "computed_tokens": round(
            sum(turn.prompt_tokens - turn.cached_tokens for turn in turns) / len(turns), 1
        ),
        "ttft_p50_ms": round(1000 * statistics.median(first), 1),
        "ttft_max_ms": round(1000 * max(first), 1),
        "latency_p50_ms": round(1000 * statistics.median(turn.seconds for turn in turns), 1),
    }


async def talk(
    args: argparse.Namespace, server: Server, tokens: int, users: int, turns: int, seed: int
) -> list[Turn]:
    """All users talk at once."""
    shared = random.Random(seed).choices(TOKENS, k=args.shared_tokens)
    limit = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=limit, read_bufsize=1 << 22
    ) as session:

        async def user(number: int) -> list[Turn]:
            choice = random.Random(1000 * seed + number + 1)
            history = shared + choice.choices(TOKENS, k=args.first_tokens)
            done: list[Turn] = []
            for turn in range(turns):
                if turn:
                    history = history + choice.choices(TOKENS, k=args.turn_tokens)
                answer, measured = await ask(session, server, history, tokens, turn)
                history = history + answer
                done.append(measured)
            return done

        found = await asyncio.gather(*(user(number) for number in range(users)))
    return [turn for turns_of_user in found for turn in turns_of_user]


async def ask(
    session: aiohttp.ClientSession, server: Server, prompt: list[int], tokens: int, turn: int
) -> tuple[list[int], Turn]:
    """One answer, streamed: its tokens and its measures.

    Raises:
        RuntimeError: it is not complete.
    """
    body = {
        "model": "model", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
        "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }  # fmt: skip
    start = time.perf_counter()
    first: float | None = None
    answer: list[int] = []
    usage: dict[str, Any] = {}
    async for chunk in completion_chunks(session, server, body):
        usage = chunk.get("usage") or usage
        for part in chunk.get("choices", ()):
            if part.get("token_ids"):
                first = first or time.perf_counter() - start
                answer += part["token_ids"]
    if len(answer) != tokens or first is None:
        raise RuntimeError(f"turn {turn + 1} got {len(answer)} of {tokens} tokens")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    seconds = time.perf_counter() - start
    return answer, Turn(turn, usage["prompt_tokens"], cached, first, seconds)


def print_table(runs: list[dict[str, Any]]) -> None:
    """Some of the turns, and the median over the later half of them."""
    turns = len(runs[0]["turns"])
    shown = sorted({1, 2, (turns + 1) // 4, (turns + 1) // 2, turns} - {0})
    heads = [f"{f'turn {turn}':>16}" for turn in shown]
    print(f"{'hit rate, TTFT':>16}", *heads, f"{'later half':>16} {'seconds':>9} {'preempted':>9}")
    for run in runs:
        cells = [cell([run["turns"][turn - 1]]) for turn in shown]
        cells.append(cell(run["turns"][turns // 2 :]))
        print(f"{run['engine']:>16}", *cells, f"{run['seconds']:9.1f} {run['preemptions']:9d}")


def cell(turns: list[dict[str, Any]]) -> str:
    hit = statistics.mean(turn["hit_rate"] for turn in turns)
    first = statistics.median(turn["ttft_p50_ms"] for turn in turns)
    return f"{hit:6.1%}{first:7.0f} ms"


if __name__ == "__main__":
    main()
