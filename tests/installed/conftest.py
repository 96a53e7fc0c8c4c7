# SPDX-License-Identifier: Apache-2.0
"""The wheel in an environment of its own, without our source tree and without a compiler.

Everything else, vLLM included, is that of the environment in which the tests run, by links: what
would take minutes to install. The server that it runs is shared by all examples.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.installed.collector import Collector

pytest.importorskip("vllm", reason="the wheel is installed beside vLLM")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny"
POLICIES = ("policy", "policy_with_op")


class Environment:
    """A virtual environment with links to the packages of this one, but for ours.

    Args:
        folder: where to make it.
    """

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        lscpu = shutil.which("lscpu")  # which vLLM asks about the processor
        if lscpu:
            (folder / "bin" / "lscpu").symlink_to(lscpu)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        (self.packages,) = folder.glob("lib/python*/site-packages")
        for name in ("purelib", "platlib"):
            for entry in Path(sysconfig.get_path(name)).iterdir():
                link = self.packages / entry.name
                ours = entry.name.startswith(("kvcompress", "__editable__"))
                if not ours and not link.exists():
                    link.symlink_to(entry)

    def run(self, *command: str | Path, **environment: str) -> str:
        """The output of a command of this environment; fails with all it said."""
        result = subprocess.run(
            [self.python, *command],
            cwd=self.elsewhere, env=self.variables(**environment), capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
        return result.stdout

    def variables(self, **more: str) -> dict[str, str]:
        """Of a process in it: no way to our sources, and nothing on the path that compiles."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
        for key in ("PYTHONPATH", "KVCOMPRESS_CHECK_INTEGRITY", "CXX", "CC", "CUDA_HOME"):
            kept.pop(key, None)
        return kept | {
            "PATH": str(self.python.parent),
            "HF_HUB_OFFLINE": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            **more,
        }

    def install(self, *wheels: Path) -> None:
        # What a wheel needs must be here: there is no index.
        self.run("-m", "pip", "install", "--quiet", "--no-index", *wheels)


@dataclass
class Server:
    url: str
    log: Path
    seconds: float
    """From the start of the process until it answered."""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make wheel` builds it, without CUDA kernels: those take long, and no GPU is needed."""
    if not shutil.which("c++") or not shutil.which("make"):
        pytest.skip("a wheel takes a C++ compiler and make")
    folder = tmp_path_factory.mktemp("dist")
    result = subprocess.run(
        ["make", "distributions", f"VENV={sys.prefix}", f"DIST={folder}", "WHEEL_KERNELS=cpu"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """With our wheel, and those of the examples' policies."""
    folder = tmp_path_factory.mktemp("installed")
    environment = Environment(folder / "environment")
    environment.install(wheel)
    for name in POLICIES:
        source = folder / name
        shutil.copytree(ROOT / "examples" / name, source)
        # Built here, where the compiler is.
        command = ["-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
        subprocess.run(
            [sys.executable, *command, "--no-build-isolation", "--wheel-dir", folder, source],
            check=True,
        )
    environment.install(*folder.glob("*.whl"))
    return environment


@pytest.fixture(scope="session")
def spans() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(
    installed: Environment, spans: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    # Not one of those that the system gives to clients: the server takes it only after a while.
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                break
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("server") / "log"
    command = [installed.python, "-m", "vllm.entrypoints.cli.main", "serve", MODEL,
               "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
               "--kv-cache-memory-bytes", "64M", "--enforce-eager",
               "--kv-compress", "ratio=8,allow_policies=loudest+outliers",
               "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
               "--structured-outputs-config",
               '{"backend": "xgrammar", "disable_any_whitespace": true}',
               "--otlp-traces-endpoint", spans.endpoint]  # fmt: skip
    environment = installed.variables(
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf", OTEL_BSP_SCHEDULE_DELAY="200"
    )
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=installed.elsewhere, env=environment, stdout=output, stderr=output
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield Server(url, log, time.monotonic() - started)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
