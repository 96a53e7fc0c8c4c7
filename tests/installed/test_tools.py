# SPDX-License-Identifier: Apache-2.0
"""Tools that others bring, as docs/tools.md shows them."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.installed.conftest import MODEL, Environment, Server

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
