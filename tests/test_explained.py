# SPDX-License-Identifier: Apache-2.0
"""What ``kvcompress-vllm doctor --url`` says of metrics."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest

from kvcompress_vllm.cli import main
from kvcompress_vllm.reporting.acceptance import ENOUGH
from kvcompress_vllm.reporting.explained import explain, render
from kvcompress_vllm.reporting.metrics import METRICS
from kvcompress_vllm.reporting.scraped import parse

OPTIONS = "policy=echo ratio=8.0 min_prompt_tokens=128 decode=True"
IDLE = {"vllm:num_requests_running": 0, "vllm:num_requests_waiting": 0,
        "vllm:kv_cache_usage_perc": 0.0, 'vllm:request_success_total{finished_reason="stop"}': 0,
        'vllm:cache_config_info{num_gpu_blocks="1000"}': 1}  # fmt: skip
ZERO = {
    f'{m.name}{{{m.label}="{value}"}}' if m.label else m.name: 0.0
    for m in METRICS
    if m.kind != "histogram"
    for value in m.values or [""]
}
WORKING = IDLE | ZERO | {
    'vllm:request_success_total{finished_reason="stop"}': 40, "vllm:num_requests_running": 12,
    "kv_compress:compressed_requests_total": 40, "kv_compress:packed_requests": 12,
    'kv_compress:compressions_total{trigger="prefill"}': 40,
    'kv_compress:kept_ratio_sum{trigger="prefill"}': 5.2,
    'kv_compress:kept_ratio_count{trigger="prefill"}': 40,
}  # fmt: skip


def text(metrics: dict[str, float]) -> str:
    return "".join(f"{name} {value}\n" for name, value in metrics.items())


def said(now: dict[str, float], before: dict[str, float] | None = None) -> list[tuple[str, str]]:
    earlier = None if before is None else parse(text(before))
    return [tuple(found) for found in explain(parse(text(now)), earlier, OPTIONS)]


def about(word: str, *arguments: dict[str, float]) -> tuple[str, str]:
    (found,) = [finding for finding in said(*arguments) if word in finding[1]]
    return found


def test_without_the_flag() -> None:
    ((level, sentence),) = said(IDLE)
    assert level == "problem" and "without --kv-compress" in sentence


def test_nothing_was_compressed() -> None:
    assert about("none was compressed", IDLE | ZERO)[0] == "info"
    ended = IDLE | ZERO | {'vllm:request_success_total{finished_reason="stop"}': 7}
    level, sentence = about("none was compressed", ended)
    assert level == "warning" and "7 requests" in sentence and "128 tokens" in sentence


def test_the_ratio_that_was_asked_for() -> None:
    assert about("as ratio=8 asks for", WORKING) == (
        "info",
        "prompts kept 0.13 of their blocks, as ratio=8 asks for",
    )
    less = WORKING | {'kv_compress:kept_ratio_sum{trigger="prefill"}': 20}
    level, sentence = about("ratio=8", less)
    assert level == "warning" and "kept 0.50" in sentence and "min_tokens_per_head" in sentence
    assert "of 1,000 blocks" in about("blocks are in use", WORKING)[1]


def test_why_requests_wait() -> None:
    assert about("no request waits", WORKING)[0] == "info"
    waits = WORKING | {"vllm:num_requests_waiting": 3}
    assert "--max-num-seqs" in about("3 requests wait", waits)[1]
    full = waits | {"vllm:kv_cache_usage_perc": 0.99}
    assert about("3 requests wait", full) == ("warning", "3 requests wait: the KV cache is full")
    kept_out = 'kv_compress:admission_refusals_total{reason="forecast"}'
    refused = waits | {kept_out: 5}
    assert "grow to" in about("3 requests wait", refused)[1]
    # It did before, and does no longer.
    assert "grow to" not in about("3 requests wait", refused, refused)[1]
    assert "grow to" in about("3 requests wait", refused | {kept_out: 6}, refused)[1]
    for name, word in (
        ('admission_refusals_total{reason="slots"}', "observe"),
        ("reserve_waits_total", "pack into"),
        ("shared_waits_total", "context"),
    ):
        assert word in about("3 requests wait", waits | {f"kv_compress:{name}": 1})[1]


def test_pressure() -> None:
    early = WORKING | {'kv_compress:compressions_total{trigger="pressure"}': 9,
                       "kv_compress:preemptions_avoided_total": 4}  # fmt: skip
    assert "avoided about 4 preemptions" in about("ran short", early)[1]
    assert about("preempted 2", early | {"kv_compress:preemptions_total": 2})[0] == "warning"
    alone = WORKING | {"kv_compress:preemptions_total": 2}
    assert "on_pressure is off" in about("preempted 2", alone)[1]
    dear = early | {
        f'kv_compress:score_mass_lost_{part}{{trigger="{trigger}"}}': value
        for trigger, value in (("prefill", 0.1), ("pressure", 0.5))
        for part, value in (("sum", value), ("count", 1))
    }
    assert about("answers may suffer", dear)[0] == "warning"


def test_echo_slots_run_short() -> None:
    short = WORKING | {"kv_compress:observation_slots": 8, "kv_compress:observation_slots_used": 8}
    assert about("observation slots", short)[0] == "warning"
    some = short | {"kv_compress:observation_slots_used": 7}
    assert not [sentence for _, sentence in said(some) if "slots" in sentence]


def test_each_engine_has_its_own_pool_and_queue() -> None:
    def labelled(metrics: dict[str, float], engine: str) -> dict[str, float]:
        return {
            f"{name[:-1]},{own}" if name.endswith("}") else f"{name}{{{own}": value
            for name, value in metrics.items()
            for own in [f'engine="{engine}"}}']
        }

    full = WORKING | {"vllm:kv_cache_usage_perc": 0.99, "vllm:num_requests_waiting": 3}
    both = labelled(WORKING, "0") | labelled(full, "10") | {"process_start_time_seconds": 5}
    found = said(both)
    assert found[0][1].startswith("80 requests were compressed (80 prefill")
    pools = [sentence for _, sentence in found if "blocks are in use" in sentence]
    assert pools[0].startswith("engine 0: 12 requests run") and "0.0% of 1,000 blocks" in pools[0]
    assert pools[1].startswith("engine 10: 12 requests run") and "99.0% of 1,000" in pools[1]
    assert ("warning", "engine 10: 3 requests wait: the KV cache is full") in found
    assert ("info", "engine 0: no request waits") in found
    # What rises is looked for in each as well.
    kept_out = 'kv_compress:admission_refusals_total{reason="forecast"}'
    before = labelled(WORKING | {kept_out: 9}, "0") | labelled(full | {kept_out: 2}, "10")
    now = labelled(WORKING | {kept_out: 9}, "0") | labelled(full | {kept_out: 3}, "10")
    (waits,) = (s for _, s in said(now, before) if "3 requests wait" in s)
    assert "grow to" in waits


def test_acceptance_of_drafted_tokens() -> None:
    def drafts(packed: str, drafted: float, accepted: float) -> dict[str, float]:
        return {f'kv_compress:draft_tokens_total{{packed="{packed}"}}': drafted,
                f'kv_compress:accepted_tokens_total{{packed="{packed}"}}': accepted}  # fmt: skip

    assert not [sentence for _, sentence in said(WORKING) if "drafted" in sentence]
    alone = WORKING | drafts("yes", ENOUGH, ENOUGH / 4)
    sentence = f"of drafted tokens were accepted: 25% of {ENOUGH:,} of packed ones"
    assert ("info", sentence) in said(alone)
    good = alone | drafts("no", ENOUGH, ENOUGH * 0.3)
    assert about("drafted tokens", good)[0] == "info"
    level, sentence = about("drafted tokens", alone | drafts("no", ENOUGH, ENOUGH / 2))
    assert level == "warning" and "50% of 1,000 of requests that were not packed" in sentence
    assert "a larger recent" in sentence


class Handler(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        body = self.answers.get(self.path.partition("?")[0])
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write((body or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_over_http(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = json.dumps({"model": "tiny", "options": OPTIONS})
    Handler.answers = {"/metrics": text(WORKING), "/kv-compress/data": page}
    assert main(["doctor", "--url", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{url}: tiny" and lines[1] == f"options: {OPTIONS}"
    assert "prompts kept 0.13 of their blocks, as ratio=8 asks for" in lines
    assert main(["doctor", "--url", url.removeprefix("http://") + "/", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["metrics"]["kv_compress:compressions_total prefill"] == 40
    assert render(report).splitlines()[1:] == lines[1:]

    Handler.answers = {"/metrics": text(IDLE)}
    assert main(["doctor", "--url", url]) == 1
    assert "PROBLEM: the server was started without --kv-compress" in capsys.readouterr().out
    Handler.answers = {"/metrics": "", "/kv-compress/data": page}
    assert main(["doctor", "--url", url]) == 1
    assert "--disable-log-stats" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "answers HTTP 404"),
        ({"/metrics": "process_start_time_seconds 1\n"}, "not those of a vLLM server"),
        ({"/metrics": "<html>"}, "not in Prometheus' format"),
    ],
)
def test_what_is_no_server(
    url: str, answers: dict[str, str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Handler.answers = answers
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--url", url])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--url", "http://127.0.0.1:9"])
    assert "nothing answers at http://127.0.0.1:9" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--url", url, "--context", "3k"])
    assert "about a --model" in capsys.readouterr().err
