# SPDX-License-Identifier: Apache-2.0
"""setup.py refuses what it cannot do, in one line. Nothing is compiled here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_setup(build: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=os.environ | {"KVCOMPRESS_BUILD": build, "PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
    )


def without(module: str, folder: Path) -> dict[str, str]:
    """An environment in which ``import module`` fails."""
    (folder / f"{module}.py").write_text(f"raise ImportError('no {module} here')\n")
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("value", ["gpu", "CPU", "1", ""])
def test_unknown_value_is_refused(value):
    result = run_setup(value)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        f"kvcompress_vllm: KVCOMPRESS_BUILD must be one of auto, cpu, cuda, none, not {value!r}"
    )


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_wish_without_torch_is_refused(build, tmp_path):
    result = run_setup(build, **without("torch", tmp_path))
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        f"kvcompress_vllm: KVCOMPRESS_BUILD={build}: PyTorch cannot be imported (no torch here)"
    )


def test_wish_without_compiler_is_refused():
    result = run_setup("cpu", CXX="no-such-compiler")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == (
        "kvcompress_vllm: KVCOMPRESS_BUILD=cpu: no C++ compiler (no-such-compiler)"
    )


def test_cuda_wish_without_toolkit_is_refused(tmp_path):
    result = run_setup("cuda", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith("kvcompress_vllm: KVCOMPRESS_BUILD=cuda: ")


@pytest.mark.parametrize("missing", ["torch", "compiler"])
def test_auto_goes_on_without_kernels(missing, tmp_path):
    environment = without("torch", tmp_path) if missing == "torch" else {"CXX": "no-such-compiler"}
    result = run_setup("auto", **environment)
    assert result.returncode == 0, result.stderr
    assert "no native kernels, the slower PyTorch reference will run: " in result.stderr
    assert result.stdout.splitlines()[-1] == "kvcompress_vllm"


def test_none_does_not_look_for_torch(tmp_path):
    result = run_setup("none", **without("torch", tmp_path))
    assert result.returncode == 0, result.stderr
    assert "kernels" not in result.stderr
