# SPDX-License-Identifier: Apache-2.0
"""``/kv-compress/contexts`` and shared contexts as users meet them: over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.integration.engines import samples
from tests.integration.test_server import serve

KEY = {"Authorization": "Bearer secret"}


def test_contexts(tmp_path: Path) -> None:
    (prompt, answer), (other, _) = samples("single", 1000, 2, offset=1900)
    flags = ["--kv-compress", "ratio=8", "--api-key", "secret"]
    with serve(tmp_path, *flags) as server, httpx.Client(base_url=server.url, headers=KEY) as http:
        path = "/kv-compress/contexts"
        for method in ("GET", "POST", "DELETE"):
            assert httpx.request(method, f"{server.url}{path}", json={}).status_code == 401
        assert http.get(path).json() == {"contexts": []}

        tokens = http.post("/tokenize", json={"model": "tiny", "prompt": prompt}).json()["tokens"]
        n = len(tokens) - 40
        asked = {"kv_compress_context_tokens": n}
        made = http.post(path, json={"prompt": tokens, "vllm_xargs": asked}, timeout=60)
        assert made.status_code == 200, made.text
        context, blocks = made.json(), n // 16
        expected = {"context_tokens": blocks * 16, "blocks": -(-blocks // 8), "users": 0,
                    "blocks_uncompressed": blocks, "hits": 0}  # fmt: skip
        assert {**expected, "id": context["id"]} == context
        # Once more: it is held, so nothing is compressed. A text is the same as its tokens.
        again = http.post(path, json={"prompt": prompt, "vllm_xargs": asked}, timeout=60).json()
        assert again == {**context, "hits": 1}

        def complete(**xargs: object) -> dict:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0,
                    "vllm_xargs": xargs}  # fmt: skip
            return http.post("/v1/completions", json=body, timeout=60).json()

        taken = complete(**asked)
        assert taken["choices"][0]["text"].strip() == answer
        usage = taken["usage"]["kv_compress"]
        assert usage["shared_blocks"] == context["blocks"]
        assert usage["context_tokens"] == context["context_tokens"]
        assert complete(**asked, kv_compress_ratio=4)["usage"]["kv_compress"]["shared_blocks"] == 0
        assert server.ours()["shared_hits_total"] == 2 and server.ours()["shared_contexts"] == 2
        held = http.get("/kv-compress/data").json()["contexts"]
        assert {item["name"] for item in held} >= {context["id"]}
        assert prompt[:40] not in http.get(path).text

        messages = [{"role": "user", "content": other[len("<|user|>") : -len("<|assistant|>")]}]
        chat = http.post(path, json={"messages": messages}, timeout=60)
        assert chat.status_code == 200, chat.text
        assert chat.json()["context_tokens"] >= 900

        assert http.delete(f"{path}/{context['id']}").json() == {"dropped": 1}
        assert http.delete(f"{path}/{context['id']}").status_code == 404
        assert complete(**asked)["usage"]["kv_compress"]["shared_blocks"] == 0
        assert http.delete(path).json()["dropped"] == 3
        assert http.get(path).json() == {"contexts": []}

        for body, reason in (
            ({}, "give a prompt"),
            ([1, 2], "must be a JSON object"),
            ({"prompt": ["a"]}, "a list of token ids"),
            ({"prompt": tokens[:30]}, "must have at least 128"),
            ({"prompt": tokens, "colour": 1}, "the fields are"),
            ({"prompt": tokens, "cache_salt": 3}, "cache_salt"),
            ({"prompt": tokens, "kv_compress_ratio": 3}, "vllm_xargs"),
            ({"prompt": tokens, "vllm_xargs": {"kv_compress_ratio": "x"}}, "kv_compress_ratio"),
            ({"prompt": tokens, "vllm_xargs": {"kv_compress_context_tokens": 5000}}, "has"),
            ({"prompt": tokens, "vllm_xargs": {"kv_compress_context_tokens": "x"}}, "integer"),
            ({"prompt": tokens, "vllm_xargs": {"kv_compress": False}}, "kv_compress"),
            ({"prompt": [10**9] * 200}, ""),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text only"),
        ):
            refused = http.post(path, json=body)
            assert refused.status_code == 400, (body, refused.text)
            assert reason in refused.text, (body, refused.text)
        gains = {"prompt": tokens, "vllm_xargs": {"kv_compress_ratio": 1}}
        assert http.post(path, json=gains, timeout=60).status_code == 409
        unknown = http.post(path, json={"prompt": prompt, "model": "none"})
        assert unknown.status_code == 404
        assert server.used_blocks() == 0


XARGS = "is not accepted; it must be an object of kv_compress options"
NO_TEXT = "messages are not accepted; they must be text only"


def odd_bodies(tokens: list[int]) -> Iterator[tuple[dict[str, Any], str]]:
    """What no client should send, and what it is told."""
    for xargs in (["ab"], [["kv_compress_ratio", 2]], [], 0, 1, "", "ab", False):
        yield {"prompt": tokens, "vllm_xargs": xargs}, XARGS
    for part in ({"type": "text"}, {"type": "text", "text": 3}, {"type": "image_url"}, "ab", None):
        yield {"messages": [{"role": "user", "content": [part]}]}, NO_TEXT
    for message in ({}, {"role": 3, "content": "x"}, {"role": "user", "content": 3}):
        yield {"messages": [message]}, ""
    for call in ({}, {"type": "function"}, {"function": {}}, {"function": {"arguments": "{"}}):
        yield {"messages": [{"role": "assistant", "content": "x", "tool_calls": [call]}]}, ""
    for messages in ("ab", 3, {"role": "user"}, [], [[]], [3], ["ab"], [None]):
        yield {"messages": messages}, "it must be a list of at least one message"
    yield {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 / 0 }}"}, ""
    for token in (True, 1.0, None, "a", [1]):
        yield {"prompt": [*tokens, token]}, "a list of token ids, integers >= 0"
    for prompt in ([tokens], [], 3, {}):
        yield {"prompt": prompt}, ""
    stride = {"kv_compress_context_stride": 2**64}
    yield {"prompt": tokens, "vllm_xargs": stride}, "kv_compress_context_stride=1844674407370955161"
    for token in (2**31, 2**63, 2**64, -(2**63), -1):
        yield {"prompt": [*tokens[:-40], token, *tokens[-40:]]}, "oken"


def test_odd_bodies(tmp_path: Path) -> None:
    """HTTP 400, and the server lives: a negative token id once ended the engine."""
    prompt, _ = samples("single", 600, 1, offset=1950)[0]
    with serve(tmp_path, "--kv-compress", "ratio=8") as server:
        url = f"{server.url}/kv-compress/contexts"
        answer = httpx.post(f"{server.url}/tokenize", json={"model": "tiny", "prompt": prompt})
        tokens = answer.json()["tokens"]
        wrong = []
        for body, reason in odd_bodies(tokens):
            refused = httpx.post(url, json=body, timeout=60)
            if refused.status_code != 400 or reason not in refused.text:
                brief = {key: str(value)[-90:] for key, value in body.items()}
                wrong.append((brief, refused.status_code, refused.text[:300]))
        assert not wrong, "\n".join(map(str, wrong))
        # None is what tables have for a row that says nothing.
        nothing = {"kv_compress_context_tokens": None, "kv_compress_ratio": None}
        call = {"type": "function", "id": "a", "function": {"name": "f", "arguments": "{}"}}
        messages = [{"role": "user", "content": prompt},
                    {"role": "assistant", "content": "x", "tool_calls": [call]}]  # fmt: skip
        called = httpx.post(url, json={"messages": messages}, timeout=60)
        assert called.status_code == 200, called.text
        for xargs in (nothing, {}, None):
            held = httpx.post(url, json={"prompt": tokens, "vllm_xargs": xargs}, timeout=60)
            assert held.status_code == 200, held.text
            assert held.json()["context_tokens"] == len(tokens) // 16 * 16
        assert "Traceback" not in server.log.read_text()
