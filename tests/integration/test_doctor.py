# SPDX-License-Identifier: Apache-2.0
"""``kvcompress-vllm doctor`` as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from kvcompress_vllm.config import presets
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.compat import contract
from kvcompress_vllm.integration.compat.tested import TESTED
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
    checked = len(contract.questions())
    assert f"contract with vLLM: {checked} names checked, all intact" in lines
    assert any(line.startswith("tested with this vLLM: contract passed, engine") for line in lines)
    assert "plugin kv_compress (vllm.general_plugins): visible to vLLM" in lines
    assert "PROBLEM" not in result.stdout and "ratio=2.0 page_dtype=fp8" in result.stdout
    assert f"presets: {', '.join(presets.names())}" in lines and "cake" in presets.names()
    assert "CUDA" not in result.stderr, "nobody asked for it"


def test_json() -> None:
    result = run("-m", "kvcompress_vllm", "doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["problems"] == []
    assert report["versions"].keys() == {"kvcompress_vllm", "vllm", "torch", "cuda", "python"}
    assert report["kernels"].keys() == {"CPU", "CUDA"} and report["cpu_instruction_set"]
    assert report["kernels"]["CPU"].keys() == SCHEMAS.keys()
    assert report["contract"]["checked"] == len(contract.questions())
    assert report["contract"]["broken"] == [] and report["contract"]["tested"]
    assert KVCompressConfig.from_dict(report["defaults"]) == KVCompressConfig(page_dtype="fp8")
    assert "kv_compress" in report["policies"] and "cake" in report["presets"]


def test_a_broken_hook_is_named() -> None:
    result = broken(
        "from kvcompress_vllm.integration.compat import contract, hooks; contract.HOOKS += "
        "(hooks.Hook('vllm.engine.arg_utils:EngineArgs.gone', (), 'the reason', 'never'),)",
        "doctor",
    )
    assert result.returncode == 1
    assert re.search(r"^PROBLEM: contract .*EngineArgs\.gone.*the reason", result.stdout, re.M)
    assert re.search(r"^contract with vLLM: \d+ names checked, 1 broken$", result.stdout, re.M)
    assert result.stdout.splitlines()[-1] == "not fit to run"


def test_a_wheel_is_only_read(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.34.0-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "raise SystemExit('imported')")
    result = run("-m", "kvcompress_vllm", "doctor", "--wheel", str(wheel))
    assert result.returncode == 1
    assert "PROBLEM: vllm.engine.arg_utils:EngineArgs.add_cli_args: not there" in result.stdout
    assert re.search(r"^vLLM 0.34.0: \d+ names checked, \d+ broken$", result.stdout, re.M)
    result = run("-m", "kvcompress_vllm", "doctor", "--wheel", str(tmp_path / "none.whl"))
    assert result.returncode == 2 and "none.whl is not a wheel" in result.stderr


def with_vllm(version: str | None) -> subprocess.CompletedProcess[str]:
    """``version`` None: as if vLLM were not installed."""
    return broken(
        "from kvcompress_vllm.integration.compat import contract; "
        "from kvcompress_vllm.integration.start import doctor; "
        "contract.check = lambda *_: []; contract.unimportable = lambda _: []; "
        "stock = doctor._version; "
        f"doctor._version = lambda name: {version!r} if name == 'vllm' else stock(name)",
        "doctor",
    )


def test_a_missing_vllm() -> None:
    result = with_vllm(None)
    assert result.returncode == 1
    expected = f'PROBLEM: vLLM is missing: pip install "vllm{doctor.SUPPORTED_VLLM}"'
    assert expected in result.stdout


def test_versions_of_vllm() -> None:
    result = with_vllm("0.99.0")
    assert result.returncode == 1
    expected = f"PROBLEM: vLLM 0.99.0 is not supported; it must be {doctor.SUPPORTED_VLLM}"
    assert expected in result.stdout
    assert "warning: vLLM 0.99.0 was not tested" in result.stdout
    assert "tested with this vLLM: nothing" in result.stdout
    result = with_vllm("0.26.0+cu129")
    assert result.returncode == 0 and "tested with this vLLM: contract passed" in result.stdout
    newest = list(TESTED)[-1].rpartition(".")[0]
    assert with_vllm(f"{newest}.9").returncode == 0


def test_a_plugin_that_is_left_out() -> None:
    for value in ("", "other"):
        result = broken(
            f"import os; os.environ['VLLM_PLUGINS'] = {value!r}; "
            "from kvcompress_vllm.integration.compat import contract; "
            "contract.check = lambda *_: []",
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
