# SPDX-License-Identifier: Apache-2.0
"""What a server may have to show, without one: made of the reports that an engine would send."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kvcompress_vllm.reporting.history import SECONDS, History
from kvcompress_vllm.reporting.metrics import Compressed, Occupancy, Outcome, StepReport
from kvcompress_vllm.reporting.page import html
from kvcompress_vllm.reporting.shared import Held, SharedReport

NOW = 1_700_000_000.5
FOUND = "cmpl-3f6c2a9b71d04e5f"
OPTIONS = (
    "policy=echo ratio=8.0 page_dtype=auto window=8 recent=16 sinks=4 min_tokens_per_head=16 "
    "min_prompt_tokens=128 decode=True interval=8 on_pressure=True share=context pool=15"
)


def pages(layers: int, heads: int) -> list[list[int]]:
    """Some heads keep much, most little, as of real models."""
    return [
        [round(60 * (1.2 + math.sin(0.35 * layer + 2.1 * head)) ** 3 / 4) for head in range(heads)]
        for layer in range(layers)
    ]


def load(
    *,
    engines: int = 1,
    blocks: int,
    share: float,
    layers: int = 32,
    heads: int = 8,
    waiting: int = 0,
    contexts: int = 0,
) -> tuple[History, int]:
    """Ten minutes of a server whose pool is filled to a share of it; also its blocks."""
    history = History(list(range(engines)), NOW - SECONDS)
    for second in range(SECONDS):
        wave = 0.85 + 0.15 * math.sin(second / 40)
        for engine in range(engines):
            # Engines are not alike, and a full pool is full.
            part = min(1.0, share * (1 if share >= 1 else wave) * (1 - 0.3 * engine))
            used = round(blocks * part)
            running = max(1, used // 220)
            occupancy = Occupancy(
                blocks, blocks - used, running, round(waiting * wave), round(0.9 * used),
                min(blocks, round(1.3 * used)),
            )  # fmt: skip
            compressions = [Compressed("prefill", True, 375, 47, 376, 48)] * (1 + second % 3)
            if second % 4 == 0:
                compressions.append(Compressed("decode", False, 58, 50, 60, 52))
            if share >= 1 and second % 5 == 0:
                compressions.append(Compressed("pressure", False, 90, 60, 95, 65))
            held = [
                Held(
                    f"ctx-{number:08x}", 32000 >> number, 250 >> number, 2000 >> number, 9 - number
                )
                for number in range(contexts)
            ]
            report = StepReport(
                compressions,
                reserve_waits=int(waiting > 0 and second % 7 == 0),
                refusals={"forecast": waiting * (2 + second % 3)} if waiting else {},
                packed_requests=running,
                saved_blocks=round(used * 5.5) if share < 1 else 3 * used,
                kept_pages=[[running * n for n in layer] for layer in pages(layers, heads)],
                measured_requests=running,
                occupancy=occupancy,
                shared=SharedReport(held=held or None),
            )
            if second == SECONDS - 1 and engine == 0:
                report.outcomes = outcomes(layers, heads)
            history.record(engine, report, NOW - SECONDS + second + 0.1 * engine)
    return history, engines * blocks


def outcomes(layers: int, heads: int) -> list[Outcome]:
    """A request that was compressed twice."""
    kept = [sum(layer) for layer in pages(layers, heads)]
    return [
        Outcome(
            f"{FOUND}-0-1a2b3c4d", trigger, tokens, before, after, 0.062, 2.4, kept, heads,
            tokens // 16,
        )
        for trigger, tokens, before, after in (
            ("prefill", 6000, 375, 48), ("decode", 6940, 434, 57),
        )
    ]  # fmt: skip


def about(**more: Any) -> dict[str, Any]:
    return {
        "model": "llama-3.1-8b", "options": OPTIONS, "block_size": 16, "api_servers": 1,
        "api_server": 0, "seconds": SECONDS, "no_data": None, **more,
    }  # fmt: skip


class State:
    """What a server answers."""

    def __init__(self, history: History | None, blocks: int = 0, **more: Any) -> None:
        self.history, self.answer = history, about(blocks=blocks, **more)

    def data(self, since: float) -> dict[str, Any]:
        told = {} if self.history is None else self.history.told(since, NOW)
        return {**self.answer, **told}

    def requests(self, wanted: str) -> list[dict[str, Any]]:
        found = {} if self.history is None else self.history.outcomes(wanted)
        return [
            {"id": name, "compressions": [item._asdict() for item in items]}
            for name, items in found.items()
        ]


STATES = {
    "idle": lambda: State(History([0], NOW - 60), 57120),
    "light": lambda: State(*load(blocks=57120, share=0.004)),
    "full": lambda: State(*load(blocks=1206, share=1.0, waiting=37)),
    "deep": lambda: State(*load(blocks=20000, share=0.7, layers=80, contexts=3)),
    "small": lambda: State(*load(blocks=1300, share=0.5, layers=6, heads=2)),
    "engines": lambda: State(*load(engines=4, blocks=14000, share=0.8)),
    "silent": lambda: State(None, no_data="vLLM keeps no statistics here (--disable-log-stats)."),
}


@contextlib.contextmanager
def serving(state: State) -> Iterator[str]:
    """The page's address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            given = parse_qs(parts.query)
            status, body = 200, html()
            if parts.path.endswith("/data"):
                body = json.dumps(state.data(float(given["since"][0])))
            elif parts.path.endswith("/requests"):
                found = state.requests(given["id"][0])
                status, body = 200 if found else 404, json.dumps({"requests": found})
            self.send_response(status)
            kind = "application/json" if body.startswith("{") else "text/html; charset=utf-8"
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/kv-compress"
        server.shutdown()
