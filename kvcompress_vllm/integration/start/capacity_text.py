# SPDX-License-Identifier: Apache-2.0
"""What ``capacity.py`` found of a model, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GIB = 1 << 30


def gib(num_bytes: float) -> str:
    """A size, in GiB or MiB."""
    if abs(num_bytes) < GIB:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"


def render(report: dict[str, Any]) -> str:
    """What :func:`capacity.examine` found, for people."""
    kept = report["compressed_layers"]
    if report["compressed"]:
        all_of = len(kept) in (0, report["layers"])
        which = f"all {report['layers']} layers" if all_of else _ranges(kept, report["layers"])
        what = f"compressed in {which}"
    else:
        what = "NOT compressed"
    lines = [
        f"{report['model']} ({report['architecture']}): {what}",
        f"KV cache: {report['bytes_per_token']:,} bytes per token ({report['kv_heads']} KV heads "
        f"of {report['head_size']}, {report['cache_dtype']}), blocks of {report['block_size']}",
        f"weights: {gib(report['weights']['bytes'])}, {report['weights']['source']}",
    ]
    if "options" in report:
        lines.append(f"options: {report['options']}")
    memory = report.get("memory")
    if memory is not None:
        per = f" on each of {report['gpus']} GPUs" if report["gpus"] > 1 else ""
        lines.append(
            f"memory{per}: {gib(memory['gpu_bytes'])} x {memory['utilization']} - "
            f"{gib(memory['weights_bytes'])} of weights - {gib(memory['overhead_bytes'])} for "
            f"vLLM itself (a guess; its log says it) = {gib(memory['cache_bytes'])}"
            + (
                f", {gib(memory['beside_bytes'])} of it for compression"
                if "beside_bytes" in memory
                else ""
            )
        )
        if report["fits"]:
            lines += ["", *_table(report)]
    lines += [f"warning: {text}" for text in report["warnings"]]
    lines += [f"PROBLEM: {text}" for text in report["problems"]]
    return "\n".join(lines)


def _ranges(layers: Sequence[int], count: int) -> str:
    return f"{len(layers)} of {count} layers ({', '.join(map(str, layers))})"


def _table(report: dict[str, Any]) -> list[str]:
    rows = {(row["ratio"], row["page_dtype"]): row for row in report["fits"]}
    names = {"auto": report["cache_dtype"], "fp8": "fp8", "int4": "int4"}
    lines = [
        f"requests of {report['context']:,} tokens that fit, the latest while it is read (and the "
        "share of the keys that compression keeps):",
        "  ratio" + "".join(f"{name:>16}" for name in names.values()),
    ]
    for ratio in dict.fromkeys(ratio for ratio, _ in rows):
        cells = [
            "-"
            if (row := rows[ratio, name])["requests"] is None
            else f"{row['requests']:,} ({row['keys']:.0%})"
            for name in names
        ]
        lines.append(f"  {ratio:>5}" + "".join(f"{cell:>16}" for cell in cells))
    lines += [
        f"  -: {text}"
        for text in dict.fromkeys(row["why"] for row in report["fits"] if row["requests"] is None)
    ]
    own = report.get("configured")
    if own is not None:
        lines.append(
            f"with the options above: {own['requests']:,} ({own['blocks_packed']:,} blocks instead "
            f"of {own['blocks_full']:,} each, of {own['blocks']:,})"
        )
    return lines
