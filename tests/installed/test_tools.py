# SPDX-License-Identifier: Apache-2.0
"""Tools that others bring, as docs/tools.md shows them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.installed.conftest import MODEL, ROOT, Environment, Server

TOOLS = ROOT / "docs" / "tools.md"
VLLM = ("-m", "vllm.entrypoints.cli.main")


def compressed(server: Server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    (line,) = (ln for ln in lines if ln.startswith("kv_compress:compressed_requests_total{"))
    return float(line.split()[-1])


def test_bench_serve(installed: Environment, server: Server, tmp_path: Path) -> None:
    before = compressed(server)
    installed.run(
        *VLLM, "bench", "serve", "--base-url", server.url, "--model", "tiny",
        "--tokenizer", MODEL, "--dataset-name", "random", "--random-input-len", "600",
        "--random-output-len", "20", "--num-prompts", "8", "--num-warmups", "0",
        "--save-result", "--result-dir", tmp_path,
    )  # fmt: skip
    (result,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    assert result["completed"] == 8 and result["failed"] == 0
    assert compressed(server) - before >= 8


def test_guidellm(server: Server, tmp_path: Path) -> None:
    """The command of docs/tools.md. From an environment of its own, which GUIDELLM names."""
    program = os.environ.get("GUIDELLM") or shutil.which("guidellm")
    if program is None:
        pytest.skip("GuideLLM is not installed: GUIDELLM=.../bin/guidellm says where it is")
    (command,) = re.findall(r"^    (guidellm run .*?[^\\])$", TOOLS.read_text(), re.M | re.S)
    _, *flags = shlex.split(command.replace("http://127.0.0.1:8000", server.url))
    result, before = tmp_path / "result.json", compressed(server)
    ran = subprocess.run(
        [program, *flags, "--output", f"kind=json,path={result}"],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    (benchmark,) = json.loads(result.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 8 and totals["errored"] == 0
    assert compressed(server) - before == 8


def test_bench_throughput(installed: Environment, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    printed = installed.run(
        *VLLM, "bench", "throughput", "--model", MODEL, "--dataset-name", "random",
        "--random-input-len", "600", "--random-output-len", "20", "--num-prompts", "8",
        "--kv-compress", "ratio=8", "--enforce-eager", "--kv-cache-memory-bytes", "64M",
        "--output-json", result,
    )  # fmt: skip
    assert json.loads(result.read_text())["num_requests"] == 8
    assert "Throughput: " in printed
