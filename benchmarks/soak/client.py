# SPDX-License-Identifier: Apache-2.0
"""Sends a request, and judges how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.soak.cases import Case

ANSWERED, REFUSED, LEFT = "answered", "refused", "disconnected"
TIMEOUT = 900.0
"""Seconds after which a request counts as hanging."""


@dataclass
class Ending:
    """How a request ended.

    Attributes:
        outcome: ANSWERED, REFUSED or LEFT as it should, else what went wrong.
        status: HTTP status, 0 if there was none.
        seconds: from sending to the end.
        first: seconds to the first chunk of a stream.
        tokens: generated.
    """

    kind: str
    outcome: str
    status: int = 0
    seconds: float = 0.0
    first: float | None = None
    tokens: int = 0

    @property
    def ok(self) -> bool:
        return self.outcome in (ANSWERED, REFUSED, LEFT)


async def send(session: aiohttp.ClientSession, url: str, case: Case) -> Ending:
    """Send one request to the end, or to where the case wants to leave."""
    ending = Ending(case.kind, "")
    start = time.perf_counter()
    streamed = isinstance(case.body, dict) and bool(case.body.get("stream"))
    try:
        if case.leaves is not None and not streamed:
            await asyncio.wait_for(_exchange(session, url, case, ending, start), case.leaves)
        else:
            await _exchange(session, url, case, ending, start)
    except asyncio.TimeoutError:
        ending.outcome = LEFT if case.leaves is not None else f"hangs: no end in {TIMEOUT:.0f} s"
    except aiohttp.ClientError as error:
        ending.outcome = f"connection: {type(error).__name__}"
    ending.seconds = time.perf_counter() - start
    return ending


async def _exchange(
    session: aiohttp.ClientSession, url: str, case: Case, ending: Ending, start: float
) -> None:
    data = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    headers = {"Content-Type": "application/json"}
    limit = aiohttp.ClientTimeout(total=TIMEOUT)
    async with session.post(url + case.path, data=data, headers=headers, timeout=limit) as reply:
        ending.status = reply.status
        if reply.status != 200:
            ending.outcome = _judge_error(case, reply.status, await reply.text())
            return
        if case.refused is not None:
            ending.outcome = "accepted although bad"
            return
        assert isinstance(case.body, dict)
        if not case.body.get("stream"):
            answer = await reply.json()
            ending.tokens = answer["usage"]["completion_tokens"]
            ending.outcome = _judge(case, answer["choices"], ending.tokens)
            return
        chunks: list[dict[str, Any]] = []
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                ending.outcome = _judge_stream(case, chunks, ending)
                return
            if ending.first is None:
                ending.first = time.perf_counter() - start
            chunks.append(json.loads(line[6:]))
            if case.leaves is not None and len(chunks) > case.leaves:
                ending.outcome = LEFT
                reply.close()
                return
        ending.outcome = "the stream broke off"


def _judge_error(case: Case, status: int, text: str) -> str:
    """What an error response is worth."""
    try:
        error = json.loads(text)
        message = error.get("error", error)
        message = str(message.get("message", message.get("detail", message)))
    except (ValueError, AttributeError):
        return f"HTTP {status} without a reason"
    if case.refused is None:
        return f"HTTP {status}: {message[:150]}"
    if not 400 <= status < 500:
        return f"HTTP {status} for a bad request: {message[:150]}"
    named = message and case.refused in message
    return REFUSED if named else f"HTTP {status} does not name {case.refused!r}: {message[:150]}"


def _judge(case: Case, choices: list[dict[str, Any]], tokens: int) -> str:
    """Whether an answer is complete."""
    assert isinstance(case.body, dict)
    wanted = case.body.get("n", 1)
    if len(choices) != wanted:
        return f"{len(choices)} choices instead of {wanted}"
    if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
        return f"finish reasons {sorted({str(c['finish_reason']) for c in choices})}"
    if case.body.get("logprobs") and any(choice["logprobs"] is None for choice in choices):
        return "no logprobs"
    return _judge_tokens(case, tokens)


def _judge_tokens(case: Case, tokens: int) -> str:
    assert isinstance(case.body, dict)
    most = case.body["max_tokens"] * case.body.get("n", 1)
    if tokens > most or tokens < 1:
        return f"{tokens} tokens, at most {most} asked for"
    if case.exact is not None and tokens != case.exact * case.body.get("n", 1):
        return f"{tokens} tokens instead of {case.exact} per choice"
    return ANSWERED


def _judge_stream(case: Case, chunks: list[dict[str, Any]], ending: Ending) -> str:
    """Whether a stream that ended in order is complete."""
    assert isinstance(case.body, dict)
    for chunk in chunks:
        if "error" in chunk:
            return f"error in the stream: {str(chunk['error'])[:150]}"
    usage = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    if not usage:
        return "no usage at the end of the stream"
    ending.tokens = usage[-1]["completion_tokens"]
    reasons: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["finish_reason"] is not None:
                reasons[choice["index"]] = choice["finish_reason"]
    if len(reasons) != case.body.get("n", 1) or not {*reasons.values()} <= {"stop", "length"}:
        return f"finish reasons of the stream {reasons}"
    return _judge_tokens(case, ending.tokens)
