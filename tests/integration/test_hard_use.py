# SPDX-License-Identifier: Apache-2.0
"""Many mixed requests in a small pool, a pause, and kill -9, over HTTP."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from benchmarks.offline import STOCK
from benchmarks.server import Server, serve
from benchmarks.soak.__main__ import ENGINE, soak
from benchmarks.soak.cases import COMPLETIONS, Case
from benchmarks.soak.client import ANSWERED, LEFT, REFUSED, Ending, send
from benchmarks.soak.kill import ENGINE_CORE, WORKER, kill_9
from tests.integration.simulation import MODEL


def soaked(tmp_path: Path, **options: Any) -> dict[str, Any]:
    values = {
        "model": str(MODEL),
        "requests": 60,
        "concurrency": 30,
        "max_model_len": 512,
        "kv_tokens": None,
        "seed": 1,
        "server_log": tmp_path / "log",
        "documents": 0,
        "kill": False,
        "serve_args": [],
    }
    report = soak(argparse.Namespace(**{**values, **options}), f"{ENGINE},min_prompt_tokens=48")
    assert report["problems"] == [], (tmp_path / "log").read_text()[-4000:]
    return report


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")


def test_soak(tmp_path: Path) -> None:
    report = soaked(tmp_path)
    outcomes = report["outcomes"]
    assert outcomes[ANSWERED] >= 40 and outcomes[REFUSED] >= 3 and outcomes[LEFT] >= 2
    assert outcomes.total() == 60
    assert report["kv_compress:compressed_requests_total"] >= 10


@pytest.mark.slow
def test_soak_at_length(tmp_path: Path) -> None:
    soaked(tmp_path, requests=500, concurrency=100, seed=2)


def long_request(tokens: int = 400) -> Case:
    body = {"model": "model", "prompt": [1500] * 300, "max_tokens": tokens, "ignore_eos": True}
    return Case("long", COMPLETIONS, body, exact=tokens)


async def interrupted(server: Server, act: Any) -> list[Ending]:
    """Do something while four requests run, two of them streamed."""
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    cases = [long_request(), long_request()]
    cases += [Case("stream", COMPLETIONS, {**c.body, **streamed}, c.exact) for c in cases]
    async with aiohttp.ClientSession(read_bufsize=1 << 22) as session:
        sent = [asyncio.create_task(send(session, server.url, case)) for case in cases]
        while await asyncio.to_thread(running, server) < len(cases):
            await asyncio.sleep(0.1)
        await asyncio.to_thread(act)
        return await asyncio.gather(*sent)


def running(server: Server) -> float:
    return server.metrics()["vllm:num_requests_running"]


def after_kill(name: str, title: str = ENGINE_CORE) -> dict[str, Any]:
    """What clients and operators see of a server of which one process was killed."""
    flags = ["--tensor-parallel-size", "2"] if title == WORKER else []
    development = {"VLLM_SERVER_DEV_MODE": "1"}  # /pause and /resume
    with serve(MODEL, name, 1024, 4096, flags, environment=development) as server:
        if name != STOCK:
            pause_and_resume(server)
        endings = asyncio.run(interrupted(server, lambda: kill_9(server, title)))
        seen = {
            "endings": sorted((e.kind, e.status, e.outcome.split(":")[0]) for e in endings),
            "status": server.process.wait(60),
        }
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health")
    return seen


def pause_and_resume(server: Server) -> None:
    """``/pause?mode=keep`` freezes requests where they are, ``/resume`` ends them in order."""

    def act() -> None:
        assert httpx.post(f"{server.url}/pause", params={"mode": "keep"}).status_code == 200
        time.sleep(1)
        assert running(server) == 4
        assert httpx.post(f"{server.url}/resume").status_code == 200

    endings = asyncio.run(interrupted(server, act))
    assert {ending.outcome for ending in endings} == {ANSWERED}


LOST = [
    ("long", 500, "HTTP 500"), ("long", 500, "HTTP 500"),
    ("stream", 200, "error in the stream"), ("stream", 200, "error in the stream"),
]  # fmt: skip


def test_kill_9_of_the_engine_core_ends_the_server() -> None:
    """On CPU the worker lives in the engine core's process."""
    assert after_kill("ratio=4")["endings"] == LOST


@pytest.mark.slow
@pytest.mark.parametrize("title", [ENGINE_CORE, WORKER])
def test_kill_9_is_as_with_stock_vllm(title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if title == WORKER:  # vLLM's default: workers are not forked from threads
        monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    seen = after_kill("ratio=4", title)
    assert seen == after_kill(STOCK, title) and seen["endings"] == LOST
