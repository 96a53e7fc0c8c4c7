# SPDX-License-Identifier: Apache-2.0
"""Every example, run as its text says, with the installed wheel. All but two share a server."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from tests.installed.conftest import MODEL, ROOT, Environment, Server

EXAMPLES = ROOT / "examples"
RATIO_8 = "(76 blocks of KV cache before compression, 12 after)"
RATIO_4 = "(76 blocks of KV cache before compression, 21 after)"
RATIO_2 = "(76 blocks of KV cache before compression, 39 after)"
KEPT = "(0 blocks of KV cache before compression, 0 after)"
PRINTED = {
    "openai_client": [
        f"4923853 {RATIO_8}",
        f"4923853 {RATIO_2}",
        "kv_compress_ratio=0.5 is not accepted; it must be a number >= 1",
    ],
    "anthropic_client": [f"4923853 {RATIO_4}"],
    "langchain_client": [f"4923853 {RATIO_4}"],
    "tool_calling": [f"open_doors({{'Hobart': '4923853'}}) {RATIO_8}"],
    "json_schema": [f"4923853 {RATIO_8}"],
}


@pytest.mark.parametrize("name", PRINTED)
def test_client(name: str, installed: Environment, server: Server) -> None:
    if name == "langchain_client" and not importlib.util.find_spec("langchain_openai"):
        pytest.skip("langchain-openai is not installed (the extra `langchain`)")
    printed = installed.run(EXAMPLES / f"{name}.py", SERVER=server.url)
    assert printed.splitlines() == PRINTED[name]


@pytest.mark.parametrize("name", ["policy", "policy_with_op"])
def test_policy_of_ones_own(
    name: str, installed: Environment, server: Server, tmp_path: Path
) -> None:
    """The package's own tests, without our source tree and, where it has any, over HTTP."""
    tests = shutil.copytree(EXAMPLES / name / "tests", tmp_path / "tests")
    command = ["-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", str(tests)]
    printed = installed.run(*command, SERVER=server.url)
    assert re.search(r"^\d+ passed in", printed, re.M), printed


def test_offline(installed: Environment) -> None:
    printed = installed.run(EXAMPLES / "offline.py", MODEL).splitlines()
    assert [line for line in printed if "blocks of KV cache" in line] == [
        f"4923853 {RATIO_8}",
        f"4923853 {KEPT}",
    ]


def test_batch_file(installed: Environment, tmp_path: Path) -> None:
    requests, answers = tmp_path / "batch.jsonl", tmp_path / "answers.jsonl"
    installed.run(EXAMPLES / "batch_file.py", "write", requests, "tiny")
    installed.run(
        "-m", "vllm.entrypoints.cli.main", "run-batch", "-i", requests, "-o", answers,
        "--model", MODEL, "--served-model-name", "tiny", "--kv-compress", "ratio=8",
        "--enforce-eager", "--kv-cache-memory-bytes", "64M",
    )  # fmt: skip
    printed = installed.run(EXAMPLES / "batch_file.py", "show", answers).splitlines()
    assert sorted(printed) == [f"eight: 4923853 {RATIO_8}", f"two: 4923853 {RATIO_2}"]
