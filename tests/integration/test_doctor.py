# SPDX-License-Identifier: Apache-2.0
"""``kvcompress-vllm doctor`` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.compat.hooks import HOOKS
from kvcompress_vllm.integration.start import doctor
from kvcompress_vllm.ops import SCHEMAS

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300,
    )  # fmt: skip


def broken(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The doctor in a process where something has been broken first."""
    call = f"from kvcompress_vllm.cli import main; raise SystemExit(main({list(arguments)!r}))"
    return run("-c", f"{code}; {call}")


def test_all_is_well() -> None:
    result = run("-m", "kvcompress_vllm", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("kvcompress_vllm ") and lines[-1] == "all is well"
    assert f"vLLM hooks: {len(HOOKS)} of {len(HOOKS)} intact" in lines
    assert "plugin kv_compress (vllm.general_plugins): visible to vLLM" in lines
    assert "PROBLEM" not in result.stdout and "ratio=4.0" in result.stdout


def test_json() -> None:
    result = run("-m", "kvcompress_vllm", "doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["problems"] == []
    assert report["versions"].keys() == {"kvcompress_vllm", "vllm", "torch", "cuda", "python"}
    assert report["kernels"].keys() == {"CPU", "CUDA"} and report["cpu_instruction_set"]
    assert report["kernels"]["CPU"].keys() == SCHEMAS.keys()
    assert report["hooks"] == {"checked": len(HOOKS), "broken": []}
    assert KVCompressConfig.from_dict(report["defaults"]) == KVCompressConfig()
    assert "kv_compress" in report["policies"]


def test_a_broken_hook_is_named() -> None:
    result = broken(
        "from kvcompress_vllm.integration import hooks; "
        "hooks.HOOKS += (hooks.Hook('vllm.engine.arg_utils:EngineArgs.gone', (), 'why', 'never'),)",
        "doctor",
    )
    assert result.returncode == 1
    assert re.search(r"^PROBLEM: vLLM hook .*EngineArgs\.gone.*why", result.stdout, re.M)
    assert f"{len(HOOKS)} of {len(HOOKS) + 1} intact" in result.stdout
    assert result.stdout.splitlines()[-1] == "not fit to run"


def with_vllm(version: str | None) -> subprocess.CompletedProcess[str]:
    """``version`` None: as if vLLM were not installed."""
    return broken(
        "from kvcompress_vllm.integration import doctor, hooks; "
        "hooks.check = lambda: []; stock = doctor._version; "
        f"doctor._version = lambda name: {version!r} if name == 'vllm' else stock(name)",
        "doctor",
    )


def test_a_missing_vllm() -> None:
    result = with_vllm(None)
    assert result.returncode == 1
    assert 'PROBLEM: vLLM is missing: pip install "vllm>=0.26,<0.27"' in result.stdout


def test_versions_of_vllm() -> None:
    result = with_vllm("0.27.1")
    assert result.returncode == 1
    assert "PROBLEM: vLLM 0.27.1 is not supported; it must be >=0.26,<0.27" in result.stdout
    assert with_vllm("0.26.1+cu129").returncode == 0


def test_a_plugin_that_is_left_out() -> None:
    for value in ("", "other"):
        result = broken(
            f"import os; os.environ['VLLM_PLUGINS'] = {value!r}; "
            "from kvcompress_vllm.integration import hooks; hooks.check = lambda: []",
            "doctor",
        )
        assert result.returncode == 1
        assert f"VLLM_PLUGINS={value!r} leaves it out; vLLM will not know" in result.stdout
        assert "plugin kv_compress (vllm.general_plugins): disabled" in result.stdout


def test_a_bad_command_is_refused() -> None:
    assert run("-m", "kvcompress_vllm").returncode == 2
    assert run("-m", "kvcompress_vllm", "doktor").returncode == 2


def test_supported_versions_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'vllm = ["vllm{doctor.SUPPORTED_VLLM}"]' in text
    assert 'kvcompress-vllm = "kvcompress_vllm.cli:main"' in text
