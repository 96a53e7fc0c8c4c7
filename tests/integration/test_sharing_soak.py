# SPDX-License-Identifier: Apache-2.0
"""Thousands of requests on few documents over HTTP, in a small pool, and kill -9 in the middle."""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path

import pytest

from benchmarks.server import Server, serve
from benchmarks.soak.__main__ import describe, load, settle
from benchmarks.soak.cases import COMPLETIONS, TOKENS, Case
from benchmarks.soak.client import ANSWERED, LEFT, Ending
from tests.integration.simulation import MODEL
from tests.integration.test_hard_use import ENGINE_CORE, kill_9

LENGTH, CONCURRENCY, POOL = 1024, 60, 2400
ENGINE = "ratio=8,allow_policies=true,min_prompt_tokens=48,interval=2"
ENDED = "vllm:e2e_request_latency_seconds_count"


def shared_case(number: int) -> Case:
    """One request on one of six documents: its options differ, and some clients leave."""
    choice = random.Random(number)
    document = min(int(choice.paretovariate(1)) - 1, 5)
    source = random.Random(document)
    context = source.choices(TOKENS, k=source.randint(200, 600))
    asked = choice.choice([
        {}, {}, {"kv_compress_ratio": 4}, {"kv_compress_protect": "0:40"},
        {"kv_compress_policy": "snapkv"}, {"kv_compress_exact": "kvzip"}, {"kv_compress": False},
    ])  # fmt: skip
    if asked.get("kv_compress", True):
        asked = {**asked, "kv_compress_context_tokens": choice.choice([len(context), 150])}
    tokens = choice.choice([1, 8, 32, 100])
    body = {
        "model": "model", "max_tokens": tokens, "ignore_eos": True, "vllm_xargs": asked,
        "prompt": [*context, *choice.choices(TOKENS, k=choice.randint(1, 80))],
    }  # fmt: skip
    leaves = None
    if choice.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        leaves = choice.randint(0, 6) if choice.random() < 0.2 else None
    return Case("shared", COMPLETIONS, body, tokens, leaves)


async def load_and_kill(server: Server, cases: list[Case], after: int) -> list[Ending]:
    """Send cases, and kill the engine once so many have ended."""

    async def watch() -> None:
        while (await asyncio.to_thread(server.metrics)).get(ENDED, 0) < after:
            await asyncio.sleep(0.2)
        await asyncio.to_thread(kill_9, server, ENGINE_CORE)

    watching = asyncio.create_task(watch())
    endings, _ = await load(server, cases, CONCURRENCY)
    await watching
    return endings


def soak_with_kill(requests: int, tmp_path: Path) -> dict:
    """A server whose engine is killed in the middle, and one that answers the other half."""
    cases = [shared_case(number) for number in range(requests)]
    half = requests // 2
    environment = {"KVCOMPRESS_CHECK_INTEGRITY": "1"}
    flags = ["--max-num-seqs", str(CONCURRENCY)]
    with serve(MODEL, ENGINE, LENGTH, POOL, flags, environment=environment) as server:
        endings = asyncio.run(load_and_kill(server, cases, half))
        assert server.process.wait(60) != 0
        log = server.log()
    # None hangs: who was in flight has an error, who came later no connection.
    assert len(endings) == requests
    good = sum(ending.outcome in (ANSWERED, LEFT) for ending in endings)
    assert half <= good < requests, log[-4000:]
    assert not [e for e in endings if e.outcome.startswith("hangs")]
    with serve(MODEL, ENGINE, LENGTH, POOL, flags, environment=environment) as server:
        start = time.perf_counter()
        rest = cases[good:]
        endings, memory = asyncio.run(load(server, rest, CONCURRENCY))
        seconds = time.perf_counter() - start
        left, metrics = asyncio.run(settle(server))
        log = server.log()
        (tmp_path / "log").write_text(log)
    args = argparse.Namespace(model=str(MODEL), requests=len(rest), concurrency=CONCURRENCY, seed=0)
    report = describe("shared", args, POOL, seconds, endings, memory, left, metrics, log)
    assert report["problems"] == [], log[-4000:]
    return report


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_soak_with_sharing_and_kill_9(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    report = soak_with_kill(2000, tmp_path)
    print(report)
    assert report["kv_compress:shared_hits_total"] > 200
