# SPDX-License-Identifier: Apache-2.0
"""The documents about the metrics name all that there are, and no others."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcompress_vllm.records.plan import Compression
from kvcompress_vllm.reporting import metrics
from kvcompress_vllm.reporting.metrics import METRICS, Compressed, StepReport

DOCS = Path(__file__).parents[1] / "docs"
ALERTS = DOCS / "prometheus"
BY_NAME = {metric.name: metric for metric in METRICS}
NAME = r"kv_compress:\w+"


def dashboard() -> dict[str, Any]:
    return json.loads((DOCS / "grafana" / "kv-compress.json").read_text())


def expressions() -> list[str]:
    return [t["expr"] for panel in dashboard()["panels"] for t in panel.get("targets", ())]


def series(name: str) -> metrics.Metric | None:
    """The metric that exports the series ``name``."""
    histogram = BY_NAME.get(name.removesuffix("_bucket"))
    if histogram is not None and histogram.kind == "histogram":
        return histogram
    return BY_NAME.get(name)


def test_the_dashboard_shows_what_we_export() -> None:
    shown = {name for text in expressions() for name in re.findall(NAME, text)}
    assert {name for name in shown if series(name) is None} == set()
    assert {series(name) for name in shown} == set(METRICS), "every metric has its panel"
    everywhere = set(re.findall(NAME, json.dumps(dashboard())))
    assert everywhere == shown


def test_the_dashboard_asks_for_labels_that_exist() -> None:
    for text in expressions():
        for name, selector in re.findall(rf"({NAME}){{(.*?)}}", text):
            metric = series(name)
            assert metric is not None
            labels = set(re.findall(r"(\w+)=~?\"", selector)) - {"model_name", "engine"}
            assert labels <= {metric.label}
            for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
                assert label == metric.label and value in metric.values
        # Rates of counters and histograms, plain gauges.
        for prefix, name in re.findall(rf"(rate\()?({NAME})", text):
            metric = series(name)
            assert metric is not None and bool(prefix) == (metric.kind != "gauge"), text


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((ALERTS / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alerts_ask_for_what_we_export() -> None:
    for rule in alerts():
        for name, selector in re.findall(rf"({NAME})(?:{{(.*?)}})?", rule["expr"]):
            found = BY_NAME.get(re.sub("_(sum|count)$", "", name)) or series(name)
            assert found is not None, name
            for label, value in re.findall(r'(\w+)="([^"]*)"', selector):
                assert label == found.label and value in found.values
            if "sum by (model_name, engine, reason)" in rule["expr"]:
                assert found.label == "reason"
        assert {"severity"} == rule["labels"].keys()
        assert {"summary", "description"} == rule["annotations"].keys()


def test_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("the alerts' tests need promtool (Debian: prometheus)")
    command = [promtool, "test", "rules", "alerts.test.yaml"]
    result = subprocess.run(command, cwd=ALERTS, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    tested = yaml.safe_load((ALERTS / "alerts.test.yaml").read_text())["tests"]
    fired = {
        case["alertname"] for test in tested for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }  # fmt: skip
    assert fired == {rule["alert"] for rule in alerts()}


def test_the_dashboard_is_laid_out() -> None:
    board = dashboard()
    assert {"uid", "title", "schemaVersion", "templating", "time", "panels"} <= board.keys()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    variables = {v["name"] for v in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w+)", json.dumps(board)))
    assert used - {"__rate_interval", "__all"} <= variables | {"__rate_interval", "__all"}
    places = [panel["gridPos"] for panel in board["panels"]]
    assert all(p["x"] >= 0 and p["x"] + p["w"] <= 24 for p in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (a, b)


def test_the_table_is_complete() -> None:
    text = (DOCS / "metrics.md").read_text()
    rows = re.findall(rf"^\| `({NAME})` \| (\w+) \|(.*?)\| .+ \|$", text, re.M)
    assert [row[0] for row in rows] == [metric.name for metric in METRICS]
    for name, kind, label in rows:
        metric = BY_NAME[name]
        assert kind == metric.kind
        expected = [metric.label, *metric.values] if metric.label else []
        assert re.findall(r"`(\w+)`", label) == expected
    assert {name for name in re.findall(NAME, text) if series(name) is None} == set()


def test_what_a_compression_is_worth() -> None:
    """A second compression of a row of 20 blocks: 4 packed for 16, and 4 full ones since."""
    recorder = metrics.Recorder()
    row = [*range(1, 5), *[0] * 12, *range(5, 9)]
    recorder.compressed(Compression("r", 0, 0, 320, 16, 4, 20, row, [9] * 5, trigger="decode"))
    (item,) = recorder.take({"r": (20, 5)}, 0, 4).compressions
    assert item == Compressed("decode", True, 8, 5, 8, 5)
    assert recorder.take({}, 0, 4) == StepReport(observation_slots=4)
