# SPDX-License-Identifier: Apache-2.0
"""What compression shows to users over HTTP: the ``usage`` of responses and the live page."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import vllm
from fastapi import FastAPI
from starlette.datastructures import State

from kvcompress_vllm.integration.frontend import endpoints
from tests.integration.engines import engine, samples
from tests.integration.simulation import MODEL
from tests.integration.test_server import Server, complete, serve
from tests.policies.installed import package

MODEL_CONFIG = json.loads((MODEL / "config.json").read_text())
LAYERS, HEADS = MODEL_CONFIG["num_hidden_layers"], MODEL_CONFIG["num_key_value_heads"]
BLOCK_BYTES = LAYERS * HEADS * 16 * 2 * MODEL_CONFIG["head_dim"] * 2  # of bfloat16
NEVER = dict.fromkeys(
    (
        "compressions", "blocks_before", "blocks_after", "shared_blocks", "context_tokens",
        "bytes_before", "bytes_after", "draft_tokens", "accepted_tokens",
    ),
    0,
)  # fmt: skip


FAULTY = {
    "raises": ("LateRaises", "score raised KeyError: 'no such channel'"),
    "none": ("LateReturnsNothing", "score returned None"),
    "shape": ("LateWrongShape", "score returned shape"),
    "infinite": ("LateNotFinite", "not finite"),
}
"""Policies that fail once the engine runs: the class, and what the log says of it."""


def times(count: int, usage: dict[str, int]) -> dict[str, int]:
    return {key: count * value for key, value in usage.items()}


def scale_out() -> list[str]:
    """From vLLM 0.30 on the route that takes tokens answers only where a flag asks for it."""
    flags = (Path(vllm.__file__).parent / "entrypoints").rglob("cli_args.py")
    asked = any("enable_scale_out:" in file.read_text() for file in flags)
    return ["--enable-scale-out"] if asked else []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--kv-compress", "ratio=4,allow_policies=true", "--api-key", "secret", *scale_out()]
    found = {name: f"tests.policies.faulty:{policy}" for name, (policy, _) in FAULTY.items()}
    installed = package(tmp_path_factory.mktemp("installed"), **found)
    environment = {"KVCOMPRESS_PAGE": "api-key", "PYTHONPATH": installed}
    with serve(tmp_path_factory.mktemp("server"), *flags, environment=environment) as running:
        running.api_key = "secret"
        yield running


def test_usage(server: Server) -> None:
    """Every kind of response says what the log says of the same prompt."""
    (prompt, answer), (other, _) = samples("single", 600, 2, offset=1500)
    messages = [{"role": "user", "content": prompt[len("<|user|>") : -len("<|assistant|>")]}]
    client = server.client

    def last_lines(count: int) -> list[dict[str, int]]:
        lines = re.findall(r"tokens, (\d+) -> (\d+) blocks\n", server.log.read_text())[-count:]
        found = [tuple(map(int, blocks)) for blocks in lines]
        return [
            {
                **NEVER, "compressions": 1, "blocks_before": before, "blocks_after": after,
                "bytes_before": before * BLOCK_BYTES, "bytes_after": after * BLOCK_BYTES,
            }
            for before, after in found
        ]  # fmt: skip

    def one(create: Callable[..., Any], **arguments: Any) -> dict[str, int]:
        arguments = {"temperature": 0, "max_tokens": 16, **arguments}
        reply = create(model="tiny", **arguments)
        assert reply.model_dump().get("kv_transfer_params") is None
        plain = reply.usage
        stream = create(
            model="tiny", stream=True, stream_options={"include_usage": True}, **arguments
        )
        *chunks, last = stream
        assert all(chunk.usage is None for chunk in chunks) and last.choices == []
        assert last.usage.model_dump() == plain.model_dump()
        return plain.kv_compress

    completions, chat = client.completions.create, client.chat.completions.create
    usage = one(completions, prompt=prompt)
    (expected,) = last_lines(1)
    assert usage == expected and expected["blocks_before"] in (36, 37)
    assert one(chat, messages=messages) == expected
    for create, what in ((completions, {"prompt": prompt}), (chat, {"messages": messages})):
        three = one(create, n=3, temperature=1, extra_body={"top_k": 1}, **what)
        assert three == times(3, expected)
        # vLLM's front end ends these itself; the scheduler has not finished them then.
        assert one(create, stop=[answer[2]], **what) == expected
        assert one(create, max_tokens=1, **what) == NEVER, "no second step, no compression"
        off = {"vllm_xargs": {"kv_compress": False}}
        assert one(create, extra_body=off, **what) == NEVER
    both = one(completions, prompt=[prompt, other])
    assert both == {key: sum(line[key] for line in last_lines(2)) for key in expected}

    continuous = list(completions(
        model="tiny", prompt=prompt, temperature=0, max_tokens=16, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    ))  # fmt: skip
    assert continuous[-1].usage.kv_compress == expected
    assert all(chunk.choices and chunk.usage.completion_tokens for chunk in continuous[:-1])
    without = list(completions(model="tiny", prompt=prompt, max_tokens=16, stream=True))
    assert all(chunk.usage is None for chunk in without)
    # Text that looks like the chunk of the usage stays text.
    tricky = 'data: {"choices":[],"usage":{}}'
    echoed = one(completions, prompt=tricky, echo=True, max_tokens=2)
    assert echoed == NEVER

    stream = completions(
        model="tiny", prompt=prompt, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    assert one(completions, prompt=prompt) == expected, "after a client that went away"
    log = server.log.read_text()
    assert "Traceback" not in log and "Error in" not in log


PROMPT, ANSWER = samples("single", 600, 1, offset=1500)[0]
QUESTION = PROMPT[len("<|user|>") : -len("<|assistant|>")]
MESSAGES = [{"role": "user", "content": QUESTION}]
TOKENS_IN = "/inference/v1/generate"
INCLUDED = {"stream_options": {"include_usage": True}}
ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "/v1/completions": ({"prompt": PROMPT, "max_tokens": 8}, INCLUDED),
    "/v1/chat/completions": ({"messages": MESSAGES, "max_tokens": 8}, INCLUDED),
    "/v1/chat/completions/batch": ({"messages": [MESSAGES] * 2, "max_tokens": 8}, None),
    "/v1/responses": ({"input": QUESTION, "max_output_tokens": 8}, {}),
    "/v1/messages": ({"messages": MESSAGES, "max_tokens": 8}, {}),
    "/invocations": ({"messages": MESSAGES, "max_tokens": 8}, INCLUDED),
    TOKENS_IN: ({"token_ids": [1500] * 590, "sampling_params": {"max_tokens": 8}}, INCLUDED),
}
"""A body for every route that generates, and what its stream needs to tell the usage."""
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "too small": ({"kv_compress_ratio": 0.5}, "kv_compress_ratio=0.5 is not accepted"),
    "true": ({"kv_compress_ratio": True}, "kv_compress_ratio=True is not accepted"),
    "misspelt": ({"kvcompress_ratio": 2}, "did you mean kv_compress_ratio?"),
    "bare": ({"ratio": 2}, "did you mean kv_compress_ratio?"),
    "policy": ({"kv_compress_policy": "nap"}, "kv_compress_policy='nap' is not accepted"),
    "object": ({"kv_compress_ratio": {"a": 1}}, "kv_compress_ratio={'a': 1} is not accepted"),
    "beyond the prompt": ({"kv_compress_context_tokens": 5000}, "the tokens of the prompt"),
    "too short": ({"kv_compress_context_tokens": 100}, ">= 128 (min_prompt_tokens)"),
    "too long": ({"kv_compress_protect": "0:1," * 10**6}, "4096 characters together"),
    "long key": ({f"kv_compress_\n\x1b{'x' * 10**6}": 1}, r"unknown kv_compress_\n\x1bxxx"),
}


def post(server: Server, route: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.api_key}"}
    body = {"model": "tiny", **body}
    return httpx.post(f"{server.url}{route}", json=body, headers=headers, timeout=300)


def asking(route: str, xargs: dict[str, Any]) -> dict[str, Any]:
    """The body of a route with these xargs, where it takes them."""
    body, _ = ROUTES[route]
    if route != TOKENS_IN:
        return {**body, "vllm_xargs": xargs}
    return {**body, "sampling_params": {**body["sampling_params"], "extra_args": xargs}}


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_tells_and_takes(server: Server, route: str) -> None:
    """The usage, streamed or not, and a request's own wish."""
    body, streamed = ROUTES[route]
    usage = post(server, route, body).json()["usage"]["kv_compress"]
    choices = 2 if route.endswith("batch") else 1
    assert usage["compressions"] == choices
    assert usage["blocks_before"] in range(36 * choices, 38 * choices + 1)
    assert usage["blocks_after"] in (9 * choices, 10 * choices, 11 * choices)
    off = post(server, route, asking(route, {"kv_compress": False})).json()
    assert off["usage"]["kv_compress"] == NEVER
    if streamed is not None:
        reply = post(server, route, {**body, **streamed, "stream": True})
        assert reply.status_code == 200
        told = re.findall(r'"kv_compress":(\{[^}]*\})', reply.text)
        assert [json.loads(item) for item in told] == [usage], "once, at the end"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_bad_requests_are_refused_before_a_response_begins(
    server: Server, route: str, streamed: bool
) -> None:
    for name, (xargs, expected) in BAD.items():
        reply = post(server, route, {**asking(route, xargs), "stream": streamed})
        assert reply.status_code == 400, (name, reply.text[:500])
        error = reply.json()["error"]
        assert expected in error["message"] and len(reply.text) < 1000, (name, reply.text[:1000])
    body, _ = ROUTES[route]
    for field in ("kv_compress", "kv_compress_ratio"):
        reply = post(server, route, {**body, field: False, "stream": streamed})
        assert reply.status_code == 400 and f"{field} in the body" in reply.text


def fails(server: Server, route: str, policy: str, streamed: bool) -> None:
    """A request whose policy fails is answered with an error: HTTP 500, or where its stream has
    begun, an error that ends it. For tokens vLLM says so in the ``finish_reason``."""
    body = {**asking(route, {"kv_compress_policy": policy}), "stream": streamed}
    reply = post(server, route, body)
    if reply.status_code != 500:
        begun = reply.status_code == 200 and (streamed or route == TOKENS_IN)
        assert begun and '"error"' in reply.text, (route, policy, reply.text)


def test_a_failing_policy_is_an_error_of_its_request_alone(server: Server) -> None:
    """The stream of a neighbour goes on, whatever fails beside it, on any route."""
    neighbour = {"model": "tiny", "prompt": PROMPT, "max_tokens": 600, "ignore_eos": True,
                 "temperature": 0, "stream": True, **INCLUDED}  # fmt: skip
    headers = {"Authorization": f"Bearer {server.api_key}"}
    address = f"{server.url}/v1/completions"
    with httpx.stream("POST", address, json=neighbour, headers=headers, timeout=300) as reply:
        lines = reply.iter_lines()
        received = [next(lines)]
        for policy in FAULTY:
            fails(server, "/v1/completions", policy, streamed=False)
            fails(server, "/v1/completions", policy, streamed=True)
        assert server.metric("vllm:num_requests_running") == 1, "the neighbour, in the middle"
        received += lines
    text = "\n".join(received)
    assert text.rstrip().endswith("data: [DONE]") and "error" not in text
    assert '"completion_tokens":600' in text.replace(" ", "")
    for route, (_, streamed) in ROUTES.items():
        fails(server, route, "raises", streamed=False)
        # On this route vLLM breaks the stream off: its error is no event of the protocol.
        if streamed is not None and route != "/v1/responses":
            fails(server, route, "raises", streamed=True)
    log = server.log.read_text()
    for policy, (_, says) in FAULTY.items():
        assert re.search(rf"policy='{policy}'.*{re.escape(says)}", log), policy
    assert complete(server, PROMPT) == ANSWER
    assert server.used_blocks() == 0


def test_bad_for_one_of_several_is_bad_for_all(server: Server) -> None:
    xargs = {"kv_compress_context_tokens": 200}
    prompts = [[1500] * 300, [1500] * 150]
    for more in ({"n": 3}, {"prompt": prompts}, {"prompt": prompts[::-1], "n": 2}):
        body = {"prompt": prompts[1], "max_tokens": 4, "stream": True, "vllm_xargs": xargs}
        reply = post(server, "/v1/completions", {**body, **more})
        assert reply.status_code == 400 and "<= 150, the tokens of the prompt" in reply.text
    good = {"prompt": prompts[:1] * 2, "max_tokens": 4, "stream": True, "vllm_xargs": xargs}
    assert post(server, "/v1/completions", good).text.endswith("data: [DONE]\n\n")


def test_what_clients_send_cannot_forge_log_lines(server: Server) -> None:
    identity = "forged\n\x1b[31m"
    body = {"prompt": PROMPT, "max_tokens": 4, "request_id": identity}
    assert post(server, "/v1/completions", body).status_code == 200
    ours = [
        line for line in server.log.read_text().split("\n") if "kv_compress: cmpl-forged" in line
    ]
    assert len(ours) == 1 and r"cmpl-forged\n\x1b[31m" in ours[0] and "blocks" in ours[0]
    summary = re.findall(r"kv_compress: (\d+) requests? compressed", server.log.read_text())
    assert summary, "at INFO one line per second, without any name"


def test_batches(tmp_path: Path) -> None:
    """``vllm run-batch``: each line for itself, with its usage."""
    good = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8}
    bodies = [
        good,
        {**good, "vllm_xargs": {"kv_compress_ratio": 0.5}},
        {**good, "kvcompress_ratio": 2},
        {**good, "vllm_xargs": {"kv_compress": False}},
        {**good, "n": 2, "use_beam_search": True, "vllm_xargs": {"kv_compress_ratio": 2}},
    ]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    given, results = tmp_path / "in", tmp_path / "out"
    given.write_text("\n".join(map(json.dumps, lines)))
    environment = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", str(given), "-o",
         str(results), "--model", str(MODEL), "--served-model-name", "tiny", "--kv-compress",
         "ratio=4", "--kv-cache-memory-bytes", "64M"],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    told = {line["custom_id"]: line for line in map(json.loads, results.read_text().splitlines())}
    usage = [told[i]["response"]["body"]["usage"]["kv_compress"] for i in ("0", "3")]
    assert usage[0]["compressions"] == 1 and usage[1] == NEVER
    errors = [told[i]["error"]["error"]["message"] for i in ("1", "2", "4")]
    assert "kv_compress_ratio=0.5 is not accepted" in errors[0]
    assert "kvcompress_ratio in the body is not accepted" in errors[1]
    assert "kv_compress_ratio is not accepted with use_beam_search" in errors[2]


def test_offline() -> None:
    """A generation that is compressed again and again, and what vLLM returns with it."""
    from vllm import SamplingParams

    ((prompt, _),) = samples("single", 600, 1, offset=1500)
    params = [
        SamplingParams(max_tokens=400, ignore_eos=True, temperature=0),
        SamplingParams(max_tokens=20, ignore_eos=True, temperature=1, n=2),
        SamplingParams(max_tokens=40, ignore_eos=True, extra_args={"kv_compress": False}),
    ]
    with engine({"budget_tokens": 160, "interval": 4}) as llm:
        long, two, never = llm.generate([prompt] * 3, params, use_tqdm=False)
        assert long.kv_transfer_params is None
        usage = long.kv_compress
        row = math.ceil((len(long.prompt_token_ids) + 400) / 16)
        assert usage.compressions == 1 + (row - len(long.prompt_token_ids) // 16 - 1) // 4
        assert row - 5 <= usage.blocks_before <= row and usage.blocks_after in (10, 11)
        assert (two.kv_compress.compressions, two.kv_compress.blocks_after) == (2, 22)
        assert vars(never.kv_compress) == NEVER


def test_data(server: Server) -> None:
    complete(server, samples("single", 600, 1, offset=1500)[0][0])
    address = f"{server.url}/kv-compress/data"
    for wrong in ({}, {"Authorization": "Bearer other"}):
        assert httpx.get(address, headers=wrong).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    answer = httpx.get(address, headers=headers).json()
    assert answer["no_data"] is None and "ratio=4.0" in answer["options"]
    assert (answer["model"], answer["engines"], answer["api_servers"]) == ("tiny", 1, 1)
    assert answer["blocks"] == round(64 * 2**20 / (16 * LAYERS * HEADS * 2 * 64 * 2)) - 1
    seconds = [sample[0] for sample in answer["samples"]]
    assert seconds == list(range(int(seconds[0]), int(answer["time"]) + 1))
    assert {len(sample) for sample in answer["samples"]} == {len(answer["columns"])}
    later = httpx.get(f"{address}?since={seconds[-1] - 1}", headers=headers).json()
    assert later["samples"][0] == answer["samples"][-1]

    for value in ("x", "nan", ""):
        reply = httpx.get(f"{address}?since={value}", headers=headers)
        assert reply.status_code == 400 and "since" in reply.json()["error"]["param"]
    head = httpx.head(address, headers=headers)
    assert head.status_code == 200 and head.content == b"" and "no-store" in str(head.headers)
    assert httpx.post(f"{server.url}/kv-compress").status_code == 405
    assert httpx.get(f"{server.url}/kv-compress/other").status_code == 404
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_the_page_is_one_file(server: Server) -> None:
    reply = httpx.get(f"{server.url}/kv-compress")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert set(re.findall(r'(?:src|href)="([^"]*)"', reply.text)) == {"data:,"}
    assert "uPlot=function" in reply.text and ".uplot" in reply.text
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    head = httpx.head(f"{server.url}/kv-compress")
    assert head.status_code == 200 and head.content == b""
    assert head.headers["content-security-policy"] == policy


def test_who_may_see_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def paths(access: str | None) -> set[str]:
        if access is None:
            monkeypatch.delenv("KVCOMPRESS_PAGE", raising=False)
        else:
            monkeypatch.setenv("KVCOMPRESS_PAGE", access)
        app = FastAPI()
        endpoints.KVCompressEndpoints().attach_router(app)
        return {route.path for route in app.routes if "kv-compress" in route.path}

    contexts = {"/kv-compress/contexts", "/kv-compress/contexts/{name}"}  # have their own rule
    assert paths(None) == paths("open") == paths("api-key") > contexts == paths("off")
    with pytest.raises(ValueError, match=r"KVCOMPRESS_PAGE='no' is not accepted; .* off"):
        paths("no")
    monkeypatch.setenv("KVCOMPRESS_PAGE", "api-key")
    keyless = endpoints.KVCompressEndpoints().init_state(None, State(), Namespace(api_key=None))
    with pytest.raises(ValueError, match=r"KVCOMPRESS_PAGE=api-key needs --api-key"):
        asyncio.run(keyless)


class Page:
    """The page, as one who looks at it sees it."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser = browser
        browser.get_log("browser")
        browser.get(f"{server.url}/kv-compress")

    def text(self, name: str) -> str:
        return self.browser.find_element("id", name).text

    def content(self, name: str) -> str:
        """Also of what is folded away."""
        return self.browser.find_element("id", name).get_attribute("textContent")

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 120).until(lambda _: condition())

    def numbers(self, *names: str) -> list[float]:
        return [float(self.text(name).replace(",", "")) for name in names]

    def heat(self) -> list[list[float]]:
        rows = self.browser.find_elements("css selector", "#heat tbody tr")
        return [
            [float(td.get_attribute("data-value")) for td in row.find_elements("tag name", "td")]
            for row in rows
        ]

    def charts(self) -> dict[str, str]:
        """The accessible names of the charts, by what they begin with."""
        charts = self.browser.find_elements("css selector", "[role=img]")
        return {chart.accessible_name.split(",")[0]: chart.accessible_name for chart in charts}

    def painted(self) -> list[int]:
        """Of each chart, pixels that are not transparent."""
        return self.browser.execute_script(
            "return [...document.querySelectorAll('canvas')].map((c) => c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v).length)"
        )

    def background(self) -> str:
        return self.browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_the_page(browser: Any, tmp_path: Path) -> None:
    prompts = [prompt for prompt, _ in samples("single", 600, 4, offset=1600)]
    with serve(tmp_path, "--kv-compress", "ratio=4") as server:
        page = Page(browser, server)
        page.wait(lambda: page.text("notice") == "No request has been compressed yet.")
        assert page.numbers("packed_requests", "used_blocks", "compressions") == [0, 0, 0]
        assert page.text("kept_ratio") == "none" and page.heat() == []
        assert "ratio=4.0" in page.content("options") and page.text("model") == "of tiny"

        streams = [
            server.client.completions.create(
                model="tiny", prompt=prompt, max_tokens=1400, stream=True,
                extra_body={"ignore_eos": True},
            )
            for prompt in prompts
        ]  # fmt: skip
        page.wait(lambda: page.text("packed_requests") == "4")
        assert page.text("notice") == ""
        used, saved, blocks = page.numbers("used_blocks", "saved_blocks", "blocks")
        assert 40 <= used < blocks and saved >= 4 * 26
        heat = page.wait(page.heat)
        assert len(heat) == HEADS and {len(row) for row in heat} == {LAYERS}
        # All pages of the packed blocks belong to some head; prompts of 36 blocks keep 9 or 10.
        mean = sum(map(sum, heat)) / (LAYERS * HEADS)
        assert 8.9 <= mean <= 12 and len({value for row in heat for value in row}) > 2
        table = browser.find_element("css selector", "#heat table")
        assert table.accessible_name.startswith("Kept pages by layer and KV head")
        names = page.charts()
        assert list(names) == ["Block pool", "Requests", "Why requests wait",
                               "Compressions by trigger", "Kept ratio"]  # fmt: skip
        assert ", blocks, over the last" in names["Block pool"]
        assert "packed 4" in page.wait(lambda: "packed 4" in page.charts()["Requests"] and
                                       page.charts()["Requests"])  # fmt: skip
        assert min(page.painted()) > 1000

        light = page.background()
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert page.wait(lambda: page.background() != light) and min(page.painted()) > 1000
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

        for stream in streams:
            stream.close()
        page.wait(lambda: page.numbers("packed_requests", "used_blocks") == [0, 0])
        assert "No request is packed." in page.text("heat")

        def check_totals(requests: int) -> None:
            page.wait(lambda: page.text("compressed_requests") == str(requests))
            page.wait(lambda: page.numbers("saved_blocks") == [0])  # and it has ended
            ours = server.ours()
            shown = page.numbers("compressed_requests", "prefill", "decode", "pressure",
                                 "freed_blocks")  # fmt: skip
            triggers = [ours[f"compressions_total {t}"] for t in ("prefill", "decode", "pressure")]
            assert shown == [ours["compressed_requests_total"], *triggers,
                             ours["freed_blocks_total"]]  # fmt: skip
            assert page.numbers("compressions") == [sum(triggers)]
            assert page.numbers("saved_blocks") == [ours["saved_blocks"]] == [0]

        check_totals(4)
        assert 0.2 <= page.numbers("kept_ratio")[0] <= 1
        reply = server.client.completions.create(model="tiny", prompt=prompts[0], max_tokens=4)
        check_totals(5)  # without a reload
        told = httpx.get(f"{server.url}/kv-compress/requests", params={"id": reply.id}).json()
        ((request,),) = told.values()
        assert request["id"].startswith(reply.id) and len(request["compressions"]) == 1
        (outcome,) = request["compressions"]
        blocks = [outcome["before"], outcome["after"]]
        assert blocks == [reply.usage.kv_compress[f"blocks_{when}"] for when in ("before", "after")]
        assert len(outcome["layers"]) == LAYERS
        packed = outcome["after"] - (outcome["before"] - outcome["covered"])
        assert sum(outcome["layers"]) == packed * LAYERS * HEADS
        browser.find_element("id", "lookup-id").send_keys(f"{reply.id}\n")
        page.wait(lambda: request["id"] in page.text("lookup-body"))
        nobody = httpx.get(f"{server.url}/kv-compress/requests", params={"id": "cmpl"})
        assert nobody.status_code == 404 and nobody.json() == {"requests": []}
        assert browser.get_log("browser") == []


def test_the_page_asks_for_the_key(browser: Any, server: Server) -> None:
    page = Page(browser, server)
    for key, told in (("wrong", "does not accept this API key"), ("secret", "")):
        form = browser.find_element("id", "key")
        page.wait(form.is_displayed)
        assert not browser.find_element("id", "shown").is_displayed()
        text = browser.find_element("id", "key-text")
        text.clear()
        text.send_keys(key)
        form.find_element("css selector", "button").click()
        page.wait(lambda told=told: told in page.text("notice"))
        if told:
            page.wait(form.is_displayed)
    page.wait(lambda: "ratio=4.0" in page.content("options"))
    assert browser.find_element("id", "shown").is_displayed() and not form.is_displayed()


def test_without_statistics_the_page_says_why(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, "--kv-compress", "--disable-log-stats") as server:
        prompt, _ = samples("single", 600, 1, offset=1500)[0]
        usage = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=8).usage
        assert usage.kv_compress["compressions"] == 1
        page = Page(browser, server)
        page.wait(lambda: "--disable-log-stats" in page.text("notice"))
        assert not browser.find_element("id", "shown").is_displayed()
        assert browser.get_log("browser") == []
