# SPDX-License-Identifier: Apache-2.0
"""What compression shows to users over HTTP: the ``usage`` of responses and the live page."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.engines import engine, samples
from tests.integration.simulation import MODEL
from tests.integration.test_server import Server, complete, serve

MODEL_CONFIG = json.loads((MODEL / "config.json").read_text())
LAYERS, HEADS = MODEL_CONFIG["num_hidden_layers"], MODEL_CONFIG["num_key_value_heads"]
NEVER = {"compressions": 0, "blocks_before": 0, "blocks_after": 0}


def times(count: int, usage: dict[str, int]) -> dict[str, int]:
    return {key: count * value for key, value in usage.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--kv-compress", "ratio=4", "--api-key", "secret"]
    with serve(tmp_path_factory.mktemp("server"), *flags) as running:
        running.api_key = "secret"
        yield running


def test_usage(server: Server) -> None:
    """Every kind of response says what the log says of the same prompt."""
    (prompt, answer), (other, _) = samples("single", 600, 2, offset=1500)
    messages = [{"role": "user", "content": prompt[len("<|user|>") : -len("<|assistant|>")]}]
    client = server.client

    def last_lines(count: int) -> list[dict[str, int]]:
        lines = re.findall(r"(\d+) -> (\d+) blocks\n", server.log.read_text())[-count:]
        keys = ("blocks_before", "blocks_after")
        return [
            {"compressions": 1, **dict(zip(keys, map(int, blocks), strict=True))}
            for blocks in lines
        ]

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
    # Like /metrics it is open in spite of the API key: it tells the same.
    answer = httpx.get(f"{server.url}/kv-compress/data").json()
    assert answer["no_data"] is None and "ratio=4.0" in answer["options"]
    assert (answer["model"], answer["engines"], answer["api_servers"]) == ("tiny", 1, 1)
    assert answer["blocks"] == round(64 * 2**20 / (16 * LAYERS * HEADS * 2 * 64 * 2)) - 1
    seconds = [sample[0] for sample in answer["samples"]]
    assert seconds == list(range(int(seconds[0]), int(answer["time"]) + 1))
    assert {len(sample) for sample in answer["samples"]} == {len(answer["columns"])}
    later = httpx.get(f"{server.url}/kv-compress/data?since={seconds[-1] - 1}").json()
    assert later["samples"][0] == answer["samples"][-1]

    for value in ("x", "nan", ""):
        reply = httpx.get(f"{server.url}/kv-compress/data?since={value}")
        assert reply.status_code == 400 and "since" in reply.json()["error"]["param"]
    assert httpx.post(f"{server.url}/kv-compress").status_code == 405
    assert httpx.get(f"{server.url}/kv-compress/other").status_code == 404
    assert httpx.get(f"{server.url}/v1/models").status_code == 401


def test_the_page_is_one_file(server: Server) -> None:
    reply = httpx.get(f"{server.url}/kv-compress")
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert set(re.findall(r'(?:src|href)="([^"]*)"', reply.text)) == {"data:,"}
    assert "uPlot=function" in reply.text and ".uplot" in reply.text
    assert "default-src 'none'" in reply.headers["content-security-policy"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page's test needs selenium")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("the page's test needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=1280,1600"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    with webdriver.Chrome(options=options, service=service) as chrome:
        yield chrome


class Page:
    """The page, as one who looks at it sees it."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser = browser
        browser.get_log("browser")
        browser.get(f"{server.url}/kv-compress")

    def text(self, name: str) -> str:
        return self.browser.find_element("id", name).text

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 120).until(lambda _: condition())

    def numbers(self, *names: str) -> list[float]:
        return [float(self.text(name)) for name in names]

    def heat(self) -> list[list[float]]:
        rows = self.browser.find_elements("css selector", "#heat tbody tr")
        return [[float(td.text) for td in row.find_elements("tag name", "td")] for row in rows]

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
        assert "ratio=4.0" in page.text("options") and page.text("model") == "of tiny"

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
        assert len(heat) == LAYERS and {len(row) for row in heat} == {HEADS}
        # All pages of the packed blocks belong to some head; prompts of 36 blocks keep 9 or 10.
        mean = sum(map(sum, heat)) / (LAYERS * HEADS)
        assert 8.9 <= mean <= 12 and len({value for row in heat for value in row}) > 2
        table = browser.find_element("css selector", "#heat table")
        assert table.accessible_name.startswith("Kept pages by layer and KV head")
        names = page.charts()
        assert list(names) == ["Block pool", "Requests", "Compressions by trigger", "Kept ratio"]
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
        complete(server, prompts[0])
        check_totals(5)  # without a reload
        assert browser.get_log("browser") == []


def test_without_statistics_the_page_says_why(browser: Any, tmp_path: Path) -> None:
    with serve(tmp_path, "--kv-compress", "--disable-log-stats") as server:
        prompt, _ = samples("single", 600, 1, offset=1500)[0]
        usage = server.client.completions.create(model="tiny", prompt=prompt, max_tokens=8).usage
        assert usage.kv_compress["compressions"] == 1
        page = Page(browser, server)
        page.wait(lambda: "--disable-log-stats" in page.text("notice"))
        assert not browser.find_element("id", "shown").is_displayed()
        assert browser.get_log("browser") == []
