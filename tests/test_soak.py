# SPDX-License-Identifier: Apache-2.0
"""The soak sees what is wrong with a server: here one that misbehaves on request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

pytest.importorskip("aiohttp")  # comes with vLLM
from aiohttp import ClientSession, test_utils, web

from benchmarks.soak import client
from benchmarks.soak.__main__ import describe
from benchmarks.soak.cases import COMPLETIONS, Case, Cases, SharedCases
from benchmarks.soak.client import ANSWERED, LEFT, REFUSED, Ending, send
from kvcompress_vllm.scheduling.replay import ROOM

BODY = {"model": "model", "prompt": [5], "max_tokens": 3}
STREAM = BODY | {"stream": True}


def answer(tokens: int = 3, reason: str = "length", count: int = 1, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": reason, "logprobs": None}
    choices = [choice | {"index": index} for index in range(count)]
    return {"choices": choices, "usage": {"completion_tokens": tokens}, **more}


def events(*chunks: dict[str, Any], end: bool = True) -> str:
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    return "".join(lines) + ("data: [DONE]\n\n" if end else "")


def outcome(case: Case, reply: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
    async def run() -> Ending:
        app = web.Application()
        app.router.add_post(COMPLETIONS, reply)
        async with test_utils.TestServer(app) as server, ClientSession() as session:
            return await send(session, str(server.make_url("")).rstrip("/"), case)

    return asyncio.run(run()).outcome


def replying(status: int, text: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def reply(request: web.Request) -> web.StreamResponse:
        kind = "application/json" if text.startswith("{") else "text/plain"
        return web.Response(status=status, text=text, content_type=kind)

    return reply


@pytest.mark.parametrize(
    ("body", "options", "status", "text", "expected"),
    [
        (BODY, {"exact": 3}, 200, json.dumps(answer()), ANSWERED),
        (BODY, {"exact": 3}, 200, json.dumps(answer(tokens=2)), "2 tokens instead of 3"),
        (BODY, {}, 200, json.dumps(answer(tokens=4)), "4 tokens, at most 3"),
        (BODY, {}, 200, json.dumps(answer(tokens=0)), "0 tokens"),
        (BODY, {}, 200, json.dumps(answer(reason="abort")), "finish reasons"),
        (BODY | {"n": 2}, {}, 200, json.dumps(answer()), "1 choices instead of 2"),
        (BODY | {"logprobs": 1}, {}, 200, json.dumps(answer()), "no logprobs"),
        (BODY, {}, 500, '{"error": {"message": "broken"}}', "HTTP 500: broken"),
        (BODY, {}, 400, '{"error": {"message": "bad"}}', "HTTP 400: bad"),
        (BODY, {"refused": "n"}, 400, '{"error": {"message": "n is bad"}}', REFUSED),
        (BODY, {"refused": "top"}, 400, '{"error": {"message": "bad"}}', "does not name 'top'"),
        (BODY, {"refused": ""}, 400, '{"error": {"message": ""}}', "does not name"),
        (BODY, {"refused": ""}, 400, "oh", "without a reason"),
        (BODY, {"refused": ""}, 500, '{"error": {"message": "x"}}', "HTTP 500 for a bad request"),
        (BODY, {"refused": ""}, 200, json.dumps(answer()), "accepted although bad"),
        (STREAM, {"exact": 3}, 200, events(answer()), ANSWERED),
        (STREAM, {"exact": 3}, 200, events(answer(tokens=1)), "1 tokens instead of 3"),
        (STREAM, {}, 200, events(answer(), end=False), "broke off"),
        (STREAM, {}, 200, events({"error": "dead"}, answer()), "error in the stream"),
        (STREAM, {}, 200, events({"choices": []}), "no usage"),
        (STREAM | {"n": 2}, {}, 200, events(answer()), "finish reasons of the stream"),
        (STREAM, {"leaves": 0}, 200, events(answer(), answer()), LEFT),
    ],
)
def test_judgement(
    body: dict[str, Any], options: dict[str, Any], status: int, text: str, expected: str
) -> None:
    assert expected in outcome(Case("x", COMPLETIONS, body, **options), replying(status, text))


def test_a_hanging_request_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    monkeypatch.setattr(client, "TIMEOUT", 0.2)
    assert outcome(Case("x", COMPLETIONS, BODY), hang).startswith("hangs")
    assert outcome(Case("x", COMPLETIONS, BODY, leaves=0.1), hang) == LEFT


def report(
    endings: list[Ending], left: float = 0, last: int = 100, log: str = "", usage: bool = True
) -> list[str]:
    from argparse import Namespace

    args = Namespace(model=None, requests=4, concurrency=1, seed=0)
    memory = [(done, 100 if done < 3 else last) for done in range(4)]
    metrics = {"vllm:generation_tokens_total": 5.0} if usage else {}
    run = describe("8", args, 100, 1.0, endings, memory, {"x": left}, metrics, log)
    return list(run["problems"])


def test_problems() -> None:
    good = [Ending("x", ANSWERED, 200, 1.0)] * 4
    assert report(good) == []
    assert report(good[:3]) == ["3 of 4 requests ended"]
    assert report([*good[:3], Ending("x", "hangs")]) == ["1 x x: hangs"]
    assert "not given back" in report(good, left=0.1)[0]
    assert "memory grew by 10.0%" in report(good, last=110)[0]
    assert "traceback" in report(good, log="Traceback (most recent call last)")[0]
    assert "ended" in report(good, usage=False)[0]


def test_cases_are_many_kinds_and_the_same_every_time() -> None:
    cases = Cases(3, 768, compressing=True)
    once = [cases.case(number) for number in range(1000)]
    assert once == [Cases(3, 768, compressing=True).case(number) for number in range(1000)]
    kinds = {case.kind for case in once}
    assert len(kinds) > 15 and {"bad body", "bad vllm_xargs", "beam search"} <= kinds
    lengths = [cases.prompt_tokens(case) for case in once]
    assert min(n for n in lengths if n) <= 2 and max(lengths) == 767
    stock = Cases(3, 768, compressing=False)
    bodies = [stock.case(number).body for number in range(1000)]
    assert not any(isinstance(body, dict) and isinstance(body.get("vllm_xargs"), dict)
                   for body in bodies)  # fmt: skip


def test_requests_on_documents_share_them() -> None:
    cases = SharedCases(4, 1, 700, compressing=True)
    first = [cases.case(number) for number in range(200)]
    again = SharedCases(4, 1, 700, compressing=True)
    assert [again.case(number) for number in range(200)] == first
    assert len({case.kind for case in first}) == 8
    assert len({tuple(case.body["prompt"][:100]) for case in first}) == 4
    for case in first:
        assert cases.prompt_tokens(case) + case.body["max_tokens"] <= 700
        named = case.body["vllm_xargs"].get("kv_compress_context_tokens", 0)
        assert named < cases.prompt_tokens(case)
        assert bool(named) == case.kind.startswith("on a context")
        assert named + ROOM <= 700, "else it cannot be repeated"
    stock = SharedCases(4, 1, 700, compressing=False)
    assert "vllm_xargs" not in stock.case(0).body
