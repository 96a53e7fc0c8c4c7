# SPDX-License-Identifier: Apache-2.0
"""Is this installation fit to run? Looks at everything, starts nothing, and runs without vLLM."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import torch

from kvcompress_vllm import __version__, ops, policies
from kvcompress_vllm.config import presets
from kvcompress_vllm.config.auto import PREFERRED_PAGES
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.compat import contract, source
from kvcompress_vllm.integration.compat.tested import TESTED, supported

SUPPORTED_VLLM = supported()

PLUGINS = (
    ("vllm.general_plugins", "kv_compress", True, "vLLM will not know --kv-compress"),
    ("vllm.platform_plugins", "kv_compress_cpu", False, "needed only on a machine without GPU"),
)
"""Group, name, whether nothing works without it, and what its absence means."""


def quieten() -> None:
    """Have vLLM say nothing but errors. Before it is imported: its log goes to standard output,
    which is ours."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM imports it, and it complains where there is a toolkit and no GPU; we say what is there.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def gpu_memory() -> int | None:
    """Bytes of the first GPU of this machine; None where there is none."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def examine() -> dict[str, Any]:
    """Everything worth knowing, JSON-serialisable.

    Returns:
        By topic; ``problems`` and ``warnings`` are lines of text, and without problems all is well.
    """
    quieten()
    report: dict[str, Any] = {"problems": [], "warnings": []}
    report["versions"] = {
        "kvcompress_vllm": __version__,
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "python": platform.python_version(),
    }
    _examine_torch(report)
    _examine_vllm(report)
    _examine_plugins(report)
    report["defaults"] = KVCompressConfig(page_dtype=PREFERRED_PAGES).to_dict()
    report["policies"] = list(policies.names())
    report["presets"] = list(presets.names())
    if not report["presets"]:
        report["problems"].append(f"no presets in {presets.FOLDER}; install the package again")
    return report


def examine_wheel(path: str) -> dict[str, Any]:
    """What would break with the vLLM in a wheel file, which is only read.

    Returns:
        ``vllm`` (its version), ``checked`` (how many names), ``problems`` (lines of text).

    Raises:
        ValueError: the file is no wheel of vLLM.
    """
    vllm = source.wheel(Path(path))
    return {
        "vllm": vllm.version,
        "checked": len(contract.questions()),
        "problems": contract.check(vllm.answer, vllm.version),
    }


def render_wheel(report: dict[str, Any]) -> str:
    """What :func:`examine_wheel` found, for people."""
    lines = [f"PROBLEM: {text}" for text in report["problems"]]
    lines.append(
        f"vLLM {report['vllm']}: {report['checked']} names checked, "
        + (f"{len(lines)} broken" if lines else "all intact")
    )
    return "\n".join(lines)


def render(report: dict[str, Any]) -> str:
    """What :func:`examine` found, for people."""
    versions, kernels, checked = report["versions"], report["kernels"], report["contract"]
    lines = [
        f"kvcompress_vllm {versions['kvcompress_vllm']}, Python {versions['python']}",
        f"vLLM {versions['vllm'] or 'missing'} (supported: {SUPPORTED_VLLM}), "
        f"torch {versions['torch']}, CUDA {versions['cuda'] or 'none'}",
        "GPUs: "
        + (", ".join(f"{g['name']} (sm_{g['capability']})" for g in report["gpus"]) or "none"),
    ]
    for device, kernel_of in kernels.items():
        native = [op for op, has in kernel_of.items() if has]
        which = (
            f"all {len(native)} ops"
            if len(native) == len(kernel_of)
            else ", ".join(native) or "none"
        )
        isa = f", {report['cpu_instruction_set']}" if device == "CPU" and native else ""
        lines.append(f"native {device} kernels: {which}{isa}")
    if checked is not None:
        broken = len(checked["broken"])
        lines.append(
            f"contract with vLLM: {checked['checked']} names checked, "
            + (f"{broken} broken" if broken else "all intact")
        )
        lines.append(f"tested with this vLLM: {checked['tested'] or 'nothing'}")
    for plugin in report["plugins"]:
        state = "not installed" if not plugin["visible"] else (
            "visible to vLLM" if plugin["enabled"] else "disabled"
        )  # fmt: skip
        lines.append(f"plugin {plugin['name']} ({plugin['group']}): {state}")
    lines.append("defaults: " + " ".join(f"{k}={v}" for k, v in report["defaults"].items()))
    lines.append(f"policies: {', '.join(report['policies'])}")
    lines.append(f"presets: {', '.join(report['presets'])}")
    lines += [f"warning: {text}" for text in report["warnings"]]
    lines += [f"PROBLEM: {text}" for text in report["problems"]]
    lines.append("not fit to run" if report["problems"] else "all is well")
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _examine_torch(report: dict[str, Any]) -> None:
    report["versions"]["cuda"] = torch.version.cuda
    report["gpus"] = []
    with warnings.catch_warnings(record=True) as complaints:
        available = torch.cuda.is_available()
    if Path("/dev/nvidiactl").exists():  # elsewhere nobody asked for CUDA
        report["warnings"] += [str(complaint.message) for complaint in complaints]
    if available:
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            report["gpus"].append({"name": name, "capability": f"{major}{minor}"})
    # Our kernels choose by the rule that PyTorch's go by, ATEN_CPU_CAPABILITY included.
    report["cpu_instruction_set"] = torch.backends.cpu.get_cpu_capability()
    report["kernels"] = ops.backends()
    for device in ["cpu"] + ["cuda"] * bool(report["gpus"]):
        missing = ops.missing_kernels(device)
        if missing:
            report["warnings"].append(missing)


def _examine_vllm(report: dict[str, Any]) -> None:
    report["contract"] = None
    found = report["versions"]["vllm"]
    if found is None:
        report["problems"].append(f'vLLM is missing: pip install "vllm{SUPPORTED_VLLM}"')
        return
    from packaging.specifiers import SpecifierSet  # vLLM brings it

    if not SpecifierSet(SUPPORTED_VLLM).contains(found, prereleases=True):
        report["problems"].append(f"vLLM {found} is not supported; it must be {SUPPORTED_VLLM}")
    vllm = source.installed(found)
    broken = ["its source is not to be found"] if vllm is None else []
    if vllm is not None:
        broken = contract.check(vllm.answer, found) + contract.unimportable(found)
    tested = TESTED.get(found.partition("+")[0])
    report["contract"] = {
        "checked": len(contract.questions()),
        "broken": broken,
        "tested": tested and tested.describe(),
    }
    report["problems"] += [f"contract with vLLM: {line}" for line in broken]
    if tested is None:
        report["warnings"].append(f"vLLM {found} was not tested; see docs/releases.md")


def _examine_plugins(report: dict[str, Any]) -> None:
    # As vLLM reads it: unset loads all plugins, an empty value none.
    allowed = os.environ.get("VLLM_PLUGINS")
    report["plugins"] = []
    for group, name, needed, meaning in PLUGINS:
        visible = bool(entry_points(group=group, name=name))
        enabled = visible and (allowed is None or name in allowed.split(","))
        report["plugins"].append(
            {"group": group, "name": name, "visible": visible, "enabled": enabled}
        )
        if not enabled:
            reason = f"VLLM_PLUGINS={allowed!r} leaves it out" if visible else "it is not installed"
            report["problems" if needed else "warnings"].append(
                f"plugin {name} of {group}: {reason}; {meaning}"
            )
