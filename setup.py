# SPDX-License-Identifier: Apache-2.0
"""Builds the native kernels; everything else about the package is in ``pyproject.toml``.

``KVCOMPRESS_BUILD`` says what to build:

    auto   whatever the machine allows, at worst nothing (the PyTorch reference then runs); default
    cpu    the CPU kernels, or fail
    cuda   the CPU and the CUDA kernels, or fail
    none   nothing

The libraries use PyTorch's stable ABI and no Python header: one file serves every Python and every
PyTorch from 2.11 on. PyTorch is needed to build, but is no build requirement: pip would download
another one into its build environment. Instead the one of the target environment is found.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).parent
BUILDS = ("auto", "cpu", "cuda", "none")
BUILD = os.environ.get("KVCOMPRESS_BUILD", "auto")
MIN_TORCH = (2, 11)
CUDA_ARCHS = "8.0;8.6;8.9;9.0;10.0+PTX"
MACROS = [("TORCH_TARGET_VERSION", "0x020b000000000000")]
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-Xfatbin=-compress-all"]


def say(message: str) -> None:
    print(f"kvcompress_vllm: {message}", file=sys.stderr)


def refuse(message: str) -> NoReturn:
    raise SystemExit(f"kvcompress_vllm: KVCOMPRESS_BUILD={BUILD}: {message}")


def import_torch() -> Any:
    """``torch.utils.cpp_extension`` of the target environment, or why there is none."""
    # Last on the path, so that the build environment's own setuptools wins.
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch fails in many ways
        return f"PyTorch cannot be imported ({error})"
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < MIN_TORCH:
        return f"PyTorch {torch.__version__} is older than {'.'.join(map(str, MIN_TORCH))}"
    return cpp_extension


def missing_for_cpu() -> str | None:
    """Why the CPU library cannot be built, if so."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    if not shutil.which(command.split()[0]):
        return f"no C++ compiler ({command.split()[0]})"
    return None


def missing_for_cuda(cpp_extension: Any) -> str | None:
    """Why the CUDA library cannot be built, if so. A toolkit is needed, a GPU is not."""
    import torch

    if not sources("cuda", "cu"):
        return "there are no CUDA sources"
    if not torch.version.cuda:
        return f"PyTorch {torch.__version__} is built without CUDA"
    if not cpp_extension.CUDA_HOME or not nvcc(cpp_extension).exists():
        return "nvcc was not found"
    if not cudart_folder(cpp_extension):
        return "libcudart_static.a was not found in the CUDA toolkit"
    return None


def nvcc(cpp_extension: Any) -> Path:
    return Path(cpp_extension.CUDA_HOME, "bin", "nvcc")


def cudart_folder(cpp_extension: Any) -> str | None:
    """Where the CUDA toolkit keeps the static runtime; CUDA_HOME may hold a mere link to nvcc."""
    command = [str(nvcc(cpp_extension)), "--dryrun", "-c", "any.cu"]
    told = re.search(r"TOP=(\S+)", subprocess.run(command, capture_output=True, text=True).stderr)
    for home in filter(None, (told and told[1], cpp_extension.CUDA_HOME)):
        for pattern in ("lib64", "lib", "targets/*/lib"):
            for folder in Path(home).glob(pattern):
                if (folder / "libcudart_static.a").exists():
                    return str(folder.resolve())
    return None


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"csrc/{folder}/*.{suffix}"))


def extensions(cpp_extension: Any) -> list[Extension]:
    """The libraries to build; refuses what was asked for and cannot be had."""
    lacking = cpp_extension if isinstance(cpp_extension, str) else missing_for_cpu()
    if lacking and BUILD != "auto":
        refuse(lacking)
    if lacking:
        say(f"no native kernels, the slower PyTorch reference will run: {lacking}")
        return []
    headers = [str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.*h")]
    common = {"define_macros": MACROS, "depends": headers, "py_limited_api": True}
    shared = [str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*.cpp")]
    cpu = cpp_extension.CppExtension(
        "kvcompress_vllm._C", sources("cpu", "cpp") + shared, extra_compile_args=CXX_FLAGS, **common
    )
    if BUILD == "cpu":
        return [cpu]
    lacking = missing_for_cuda(cpp_extension)
    if lacking and BUILD == "cuda":
        refuse(lacking)
    if lacking:
        say(f"no CUDA kernels: {lacking}")
        return [cpu]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHS)
    # CUDAExtension would link the shared runtime, which a bare toolkit may lack at run time.
    cuda = cpp_extension.CppExtension(
        "kvcompress_vllm._C_cuda",
        sources("cuda", "cu") + shared,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        libraries=["torch_cuda", "cudart_static", "rt", "dl", "pthread"],
        library_dirs=[cudart_folder(cpp_extension)],
        **common,
    )
    return [cpu, cuda]


def build_command(cpp_extension: Any) -> type:
    """``build_ext`` that, in auto mode, goes on without the library that does not compile."""

    class Build(cpp_extension.BuildExtension):
        def build_extensions(self) -> None:
            if BUILD != "auto":
                super().build_extensions()
                return
            compiler, wanted, built = self.compiler, self.extensions, []
            for extension in wanted:
                # BuildExtension patches the compiler: each library starts from a fresh one.
                self.compiler, self.extensions = copy.copy(compiler), [extension]
                try:
                    super().build_extensions()
                    built.append(extension)
                except (Exception, SystemExit) as error:
                    say(f"{extension.name} was not built, the reference will run: {error}")
                    # In an editable install the one of an earlier build would be loaded.
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = built

    return Build


def main() -> None:
    if BUILD not in BUILDS:
        raise SystemExit(
            f"kvcompress_vllm: KVCOMPRESS_BUILD must be one of {', '.join(BUILDS)}, not {BUILD!r}"
        )
    if BUILD == "none":
        setup()
        return
    cpp_extension = import_torch()
    modules = extensions(cpp_extension)
    if not modules:
        setup()
        return
    setup(
        ext_modules=modules,
        cmdclass={"build_ext": build_command(cpp_extension)},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


main()
