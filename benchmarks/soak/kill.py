# SPDX-License-Identifier: Apache-2.0
"""Kills a server's processes in the middle of its work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import psutil

from benchmarks.server import Server
from benchmarks.soak.cases import Case
from benchmarks.soak.client import Ending

ENGINE_CORE, WORKER = "VLLM::EngineCore", "VLLM::Worker"
ENDED = "vllm:e2e_request_latency_seconds_count"

Load = Callable[[Server, list[Case], int], Awaitable[tuple[list[Ending], list[tuple[int, int]]]]]


def kill_9(server: Server, title: str) -> None:
    """Kill the last of the processes of a server that bear this title.

    Raises:
        RuntimeError: there is none.
    """
    children = psutil.Process(server.process.pid).children(recursive=True)
    victims = [child for child in children if title in " ".join(child.cmdline())]
    if not victims:
        raise RuntimeError(f"the server has no process {title}")
    victims[-1].kill()


async def load_and_kill(
    server: Server, cases: list[Case], concurrency: int, after: int, load: Load
) -> list[Ending]:
    """Send cases, and kill the engine once so many have ended."""

    async def watch() -> None:
        while (await asyncio.to_thread(server.metrics)).get(ENDED, 0) < after:
            await asyncio.sleep(0.2)
        await asyncio.to_thread(kill_9, server, ENGINE_CORE)

    watching = asyncio.create_task(watch())
    endings, _ = await load(server, cases, concurrency)
    await watching
    return endings
