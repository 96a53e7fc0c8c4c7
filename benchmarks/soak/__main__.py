# SPDX-License-Identifier: Apache-2.0
"""Hard use: thousands of mixed requests over HTTP in a KV cache much too small for them.

    python -m benchmarks.soak --requests 2000

Completions and chat of 1 token up to the longest the model takes, streamed or not, two choices,
stop strings, log probabilities, penalties, structured output, beam search, shared prefixes, budgets
of their own and opt-outs; clients that disconnect; bad bodies and bad ``vllm_xargs``. The KV cache
holds a tenth of the requests in flight. What must be true at the end: every request got a
complete answer or a clear error, none hangs, the integrity checks that ran on every step found
nothing, all blocks are back, and the server's memory does not grow between the second and the last
quarter. Else the status is 1.

With ``--documents 6`` all requests are about so many documents, and share them packed. With
``--kill`` the engine is killed (``kill -9``) when half are answered: requests in flight must end
with an error, and another server answers the others.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from tqdm import tqdm

from benchmarks.offline import BLOCK_SIZE, STOCK, engine_parser
from benchmarks.server import TOKENIZER, Server, serve
from benchmarks.soak.cases import Case, Cases, SharedCases
from benchmarks.soak.client import ANSWERED, LEFT, REFUSED, Ending, send
from benchmarks.soak.kill import load_and_kill

ENGINE = "ratio=8,allow_policies=true"
USAGE = ("vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting")
GENERATED = "vllm:generation_tokens_total"
COUNTERS = ("vllm:num_preemptions_total", "vllm:prefix_cache_hits_total",
            "vllm:prompt_tokens_total", GENERATED)  # fmt: skip
GROWTH = 0.05
"""Share by which the server's memory may differ between the second and the last quarter."""
ENVIRONMENT = {
    "KVCOMPRESS_CHECK_INTEGRITY": "1",
    # On CPU, PyTorch and oneDNN keep what they prepared for the latest 1,024 shapes of a product,
    # half a megabyte each. That fills up for longer than a soak lasts, with or without our flag.
    "LRU_CACHE_CAPACITY": "32",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
}
"""Of the servers."""


def main() -> None:
    parser = engine_parser("soak", __doc__, engines=f"{ENGINE};")
    parser.set_defaults(model=str(TOKENIZER), engines=[ENGINE])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=200, help="requests in flight")
    parser.add_argument("--max-model-len", type=int, default=2048, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=0, help="that all are about; 0: none")
    parser.add_argument("--kill", action="store_true", help="kill the engine halfway")
    parser.add_argument("--server-log", type=Path, help="write the server's log into this file")
    parser.add_argument("serve_args", nargs="*", help="after --, further flags of vllm serve")
    args = parser.parse_args()
    reports: list[dict[str, Any]] = []
    for name in args.engines:
        report = soak(args, name)
        reports.append(report)
        print_report(report)
        print(json.dumps(report), flush=True)
        if args.output:
            with args.output.open("a") as file:
                print(json.dumps(report), file=file)
    if args.plot:
        from benchmarks.plots import plot_soak

        plot_soak(reports, args.plot)
    sys.exit(any(report["problems"] for report in reports))


def soak(args: Namespace, name: str) -> dict[str, Any]:
    """Start a server, send everything, and look at what is left.

    Raises:
        RuntimeError: the server did not start.
        subprocess.TimeoutExpired: it did not end although its engine was killed.
    """
    known = args.seed, args.max_model_len, name != STOCK
    cases = SharedCases(args.documents, *known) if args.documents else Cases(*known)
    all_cases = [cases.case(number) for number in range(args.requests)]
    kv_tokens = args.kv_tokens or pool_tokens(args, cases, all_cases)
    flags = ["--max-num-seqs", str(args.concurrency), *args.serve_args]
    problems: list[str] = []
    if args.kill:
        with serve(
            args.model, name, args.max_model_len, kv_tokens, flags, environment=ENVIRONMENT
        ) as server:
            half = len(all_cases) // 2
            gone = load_and_kill(server, all_cases, args.concurrency, half, load)
            problems, done = after_kill(asyncio.run(gone), len(all_cases))
            server.process.wait(60)
        all_cases = all_cases[done:]
        args = Namespace(**{**vars(args), "requests": len(all_cases)})
    with serve(
        args.model, name, args.max_model_len, kv_tokens, flags, environment=ENVIRONMENT
    ) as server:
        start = time.perf_counter()
        endings, memory = asyncio.run(load(server, all_cases, args.concurrency))
        seconds = time.perf_counter() - start
        left, metrics = asyncio.run(settle(server))
        log = server.log()
        if args.server_log:
            args.server_log.write_text(log)
    report = describe(name, args, kv_tokens, seconds, endings, memory, left, metrics, log)
    report["problems"] += problems
    return report


def after_kill(endings: list[Ending], requests: int) -> tuple[list[str], int]:
    """What is wrong with how requests ended whose engine was killed, and how many were good."""
    good = sum(ending.ok for ending in endings)
    problems = [f"after the kill: {e.kind}: {e.outcome}" for e in endings if "hangs" in e.outcome]
    if len(endings) != requests:
        problems.append(f"after the kill: {len(endings)} of {requests} requests ended")
    if not requests // 2 <= good < requests:
        problems.append(f"the engine was killed after half, and {good} of {requests} were good")
    return problems, good


def pool_tokens(args: Namespace, cases: Cases | SharedCases, all_cases: list[Case]) -> int:
    """A tenth of what the requests in flight hold when nothing is compressed; at least what vLLM
    demands, one request of the greatest length."""
    mean = statistics.mean(cases.prompt_tokens(case) for case in all_cases)
    tenth = int(mean * args.concurrency / 10)
    return max(tenth, args.max_model_len + BLOCK_SIZE)


async def load(
    server: Server, cases: list[Case], concurrency: int
) -> tuple[list[Ending], list[tuple[int, int]]]:
    """Send all cases, so many at once; also (requests done, bytes of memory), twice a second."""
    waiting = iter(cases)
    endings: list[Ending] = []
    memory: list[tuple[int, int]] = []
    # A connection per request: one that is kept may be closed by the server just as it is reused.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    progress = tqdm(total=len(cases), smoothing=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 22) as session:

        async def client() -> None:
            for case in waiting:
                endings.append(await send(session, server.url, case))
                progress.update()

        async def watch() -> None:
            while True:
                memory.append((len(endings), resident_bytes(server.process.pid)))
                await asyncio.sleep(0.5)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(client() for _ in range(concurrency)))
        watching.cancel()
    progress.close()
    return endings, memory


def resident_bytes(pid: int) -> int:
    """RSS of a process and all below it."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


async def settle(server: Server, limit: float = 60) -> tuple[dict[str, float], dict[str, float]]:
    """Wait until the last disconnected requests have gone.

    Returns:
        What the server still holds, and all of its metrics; none of either if it has ended.
    """
    left: dict[str, float] = {}
    metrics: dict[str, float] = {}
    start = time.monotonic()
    while time.monotonic() - start < limit:
        try:
            metrics = server.metrics()
        except OSError:
            return {}, {}
        left = {name: metrics[name] for name in USAGE}
        if not any(left.values()):
            break
        await asyncio.sleep(1)
    return left, metrics


def describe(
    name: str,
    args: Namespace,
    kv_tokens: int,
    seconds: float,
    endings: list[Ending],
    memory: list[tuple[int, int]],
    left: dict[str, float],
    metrics: dict[str, float],
    log: str,
) -> dict[str, Any]:
    """The report of a run; ``problems`` is empty if all went well."""
    wrong = Counter(f"{e.kind}: {e.outcome}" for e in endings if not e.ok)
    problems = [f"{count} x {text}" for text, count in wrong.most_common(20)]
    if len(endings) != args.requests:
        problems.append(f"{len(endings)} of {args.requests} requests ended")
    if any(left.values()) or not metrics:
        problems.append(f"not given back: {left}" if metrics else "the server has ended")
    _, traceback, rest = log.partition("Traceback (most recent call last)")
    if traceback:
        problems.append(f"the server logged a traceback (--server-log): {rest[:3000]}")
    second, last = (quarter(memory, args.requests, part) for part in (1, 3))
    growth = (last - second) / second if second and last else 0.0
    if growth > GROWTH:
        problems.append(f"memory grew by {growth:.1%}")
    answered = [e for e in endings if e.outcome == ANSWERED]
    report = {
        "engine": name,
        "model": Path(args.model).name if args.model else "llama-3.1-8b shape",
        "requests": args.requests,
        "concurrency": args.concurrency,
        "kv_tokens": kv_tokens,
        "seed": args.seed,
        "seconds": round(seconds, 1),
        "outcomes": Counter(e.outcome if e.ok else "wrong" for e in endings),
        "by_kind": table(endings),
        "statuses": Counter(str(e.status) for e in endings),
        "latency_s": percentiles([e.seconds for e in answered]),
        "first_chunk_s": percentiles([e.first for e in answered if e.first is not None]),
        "memory_mib": [round(second / 2**20), round(last / 2**20)],
        "memory": [(done, round(rss / 2**20)) for done, rss in memory[:: len(memory) // 200 + 1]],
        "problems": problems,
    }
    for key, value in metrics.items():
        if key in COUNTERS or (key.startswith("kv_compress:") and key.endswith("_total")):
            report[key] = int(value)
    tokens = report.get("vllm:prompt_tokens_total", 0) + report.get(GENERATED, 0)
    return report | {"tokens_per_s": round(tokens / seconds)}


def quarter(memory: list[tuple[int, int]], requests: int, part: int) -> float:
    """Median memory while the requests of a quarter ended, 0 without samples."""
    low, high = requests * part / 4, requests * (part + 1) / 4
    return statistics.median([rss for done, rss in memory if low <= done < high] or [0])


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def table(endings: list[Ending]) -> dict[str, dict[str, int]]:
    """Outcomes of every kind of request."""
    kinds: dict[str, Counter[str]] = {}
    for ending in endings:
        outcome = ending.outcome if ending.ok else "wrong"
        kinds.setdefault(ending.kind, Counter())[outcome] += 1
    return {kind: dict(kinds[kind]) for kind in sorted(kinds)}


def print_report(report: dict[str, Any]) -> None:
    columns = (ANSWERED, REFUSED, LEFT, "wrong")
    print(f"{report['engine']}: {report['requests']} requests, {report['concurrency']} in flight, "
          f"a KV cache of {report['kv_tokens']} tokens")  # fmt: skip
    print(f"{'kind':>36}", *(f"{column:>13}" for column in columns))
    for kind, outcomes in [*report["by_kind"].items(), ("all", report["outcomes"])]:
        print(f"{kind:>36}", *(f"{outcomes.get(column, 0):13d}" for column in columns))
    for key in ("seconds", "tokens_per_s", "latency_s", "first_chunk_s", "memory_mib", "statuses"):
        print(f"{key}: {report[key]}")
    for key, value in report.items():
        if ":" in key:
            print(f"{key}: {value}")
    print("\n".join(report["problems"]) or "no problems")


if __name__ == "__main__":
    main()
