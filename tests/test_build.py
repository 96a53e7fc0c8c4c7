# SPDX-License-Identifier: Apache-2.0
"""setup.py refuses what it cannot do, in one line; what it builds is complete and the same on
every machine. Nothing is compiled here, except by the slow test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
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


SOURCES = ("csrc", "configs", "kvcompress_vllm")
BUILDERS = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def tree(root: Path) -> set[str]:
    """The files that a distribution has to hold."""
    paths = [
        path
        for folder in SOURCES
        for path in Path(root, folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    ]
    # rglob does not follow the link kvcompress_vllm/presets.
    presets = [root / "kvcompress_vllm/presets" / path.name for path in root.glob("configs/*.yaml")]
    return {str(path.relative_to(root)) for path in paths + presets}


def build(what: str, source: Path, folder: Path, kernels: str) -> Path:
    """A distribution of the sources, made without a network."""
    result = subprocess.run(
        [sys.executable, "-c", BUILDERS, what, str(folder)],
        cwd=source,
        env=os.environ | {"KVCOMPRESS_BUILD": kernels},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder / result.stdout.split()[-1]


def sdist(tmp: Path, kernels: str) -> Path:
    """A source distribution, unpacked."""
    source = tmp / f"tree-{kernels}"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "CHANGELOG.md", source)
    for name in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    # What an earlier build leaves behind belongs to nobody else.
    (source / "kvcompress_vllm/_C.abi3.so").write_bytes(b"not ours")
    archive = build("build_sdist", source, tmp, kernels)
    unpacked = tmp / f"sdist-{kernels}"
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    archive.unlink()
    (folder,) = unpacked.iterdir()
    return folder


CLEAN = """
import kvcompress_vllm, torch
from kvcompress_vllm import KVCompressConfig, ops
from kvcompress_vllm.config import presets
from kvcompress_vllm.config.spelling import parse_spec
from kvcompress_vllm.policies import BUILT_IN

print(kvcompress_vllm.__file__)
print(*presets.names())
for name in presets.names():
    KVCompressConfig.from_dict(parse_spec(name))
cache = torch.zeros(2, 1, 4, 4)
ops.write_kv(torch.ones(1, 1, 2), torch.ones(1, 1, 2) * 2, cache, torch.tensor([5]))
print(cache[1, 0, 1].tolist())
"""


@pytest.mark.parametrize("kernels", ["none", pytest.param("cpu", marks=pytest.mark.slow)])
def test_a_wheel_from_the_sdist_runs_without_the_source_tree(kernels, tmp_path):
    source = sdist(tmp_path, kernels)
    assert tree(ROOT) <= {str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()}
    assert not list(source.rglob("*.so"))
    wheel = build("build_wheel", source, tmp_path, kernels)
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(target), str(wheel)], check=True)
    shutil.rmtree(source)
    result = subprocess.run(
        [sys.executable, "-c", CLEAN],
        cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(target)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    where, names, key_and_value = result.stdout.splitlines()
    assert Path(where).is_relative_to(target)
    assert names.split() == sorted(path.stem for path in ROOT.glob("configs/*.yaml"))
    assert key_and_value == "[1.0, 1.0, 2.0, 2.0]"
    assert bool(list(target.glob("kvcompress_vllm/_C*.so"))) == (kernels == "cpu")


def test_the_sdist_is_the_same_on_every_machine(tmp_path):
    """One that can build nothing, and one that can build the CPU kernels."""
    one, other = (
        {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (sdist(tmp_path, "none"), sdist(tmp_path, "cpu"))
    )
    assert one == other
