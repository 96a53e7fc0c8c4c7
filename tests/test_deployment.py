# SPDX-License-Identifier: Apache-2.0
"""The files of examples/deploy, as far as they can be tried without Docker, a cluster and a GPU:
linters, and that what they give to ``vllm serve`` and mount is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcompress_vllm import KVCompressConfig
from kvcompress_vllm.config.spelling import parse_spec

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "examples" / "deploy"
LINTERS = {
    "Dockerfile": "hadolint",
    "kubernetes.yaml": "kubernetes-validate --strict",
    "prometheus.yml": "promtool check config",
    "smoke.sh": "bash -n",
}


@pytest.mark.parametrize("file", LINTERS)
def test_linter(file: str) -> None:
    program, *arguments = LINTERS[file].split()
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    found = shutil.which(program, path=path)
    if found is None:
        pytest.skip(f"{program} is not installed")
    result = subprocess.run([found, *arguments, DEPLOY / file], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def documents(file: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text()))


def server_arguments() -> dict[str, list[str]]:
    """What each deployment gives to ``vllm serve``."""
    (compose,), (values,) = documents("compose.yaml"), documents("production-stack.yaml")
    (deployment,) = (d for d in documents("kubernetes.yaml") if d["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (model,) = values["servingEngineSpec"]["modelSpec"]
    command = [
        re.sub(r"\$\{\w+:-(.*)\}", r"\1", word) for word in compose["services"]["vllm"]["command"]
    ]
    return {
        "compose": command,
        "kubernetes": container["args"],
        "production stack": model["vllmConfig"]["extraArgs"],
    }


def test_servers_are_given_what_they_accept() -> None:
    for where, arguments in server_arguments().items():
        spec = arguments[arguments.index("--kv-compress") + 1]
        assert KVCompressConfig.from_dict(parse_spec(spec)).ratio > 1, where


def test_all_names_the_same_release() -> None:
    named = {
        release
        for file in DEPLOY.iterdir()
        if file.is_file()
        for release in re.findall(r"(?:VLLM=|vllm-kv-compress:|tag: )(v[\d.]+)\b", file.read_text())
    }
    (release,) = named
    supported = re.search(
        r'^vllm = \["vllm>=[\d.]+,<0\.(\d+)"\]', (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert release == f"v0.{int(supported[1]) - 1}.0"


def test_what_is_mounted_is_there() -> None:
    (compose,) = documents("compose.yaml")
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists(), volume
    assert list((ROOT / "docs/grafana").glob("*.json"))
    (source,) = documents("grafana/datasources/prometheus.yaml")
    (scraped,) = documents("prometheus.yml")
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert scraped["scrape_configs"][0]["static_configs"][0]["targets"] == ["vllm:8000"]
