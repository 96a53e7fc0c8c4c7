# SPDX-License-Identifier: Apache-2.0
"""Times inside CUDA graphs, next to the bandwidth that plain kernels of this device reach."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TextIO

import torch

Step = Callable[[], object]


def seconds(steps: Sequence[Step], repeats: int = 15) -> float:
    """Median time of one step; the steps run one after another inside a graph."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    warm_up = 3
    for _ in range(repeats + warm_up):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times[warm_up:])) / len(steps)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second: the best of a memory copy and of kernels that read once, write once."""
    source = torch.randn(1 << 29, device=device)
    target = torch.empty_like(source)
    half_source, half_target = source.view(torch.bfloat16), target.view(torch.bfloat16)
    ways: dict[str, Step] = {
        "copy": partial(target.copy_, source),
        "add, fp32": partial(torch.add, source, 1.0, out=target),
        "add, bf16": partial(torch.add, half_source, 1.0, out=half_target),
    }
    speeds = {name: 2 * source.nbytes / seconds([way] * 3) for name, way in ways.items()}
    listed = ", ".join(f"{name} {speed / 1e9:.0f}" for name, speed in speeds.items())
    print(f"{torch.cuda.get_device_name(device)}, GB/s: {listed}", flush=True)
    return max(speeds.values())


class Report:
    """A JSON line per measurement, as it comes, and a table of them all."""

    ROW = "{:<20} {:<46} {:>9} {:>7} {:>6} {:>9}"

    def __init__(self, bandwidth: float, file: TextIO) -> None:
        self.bandwidth, self.file = bandwidth, file
        self.rows: list[dict[str, Any]] = []

    def add(
        self, op: str, case: str, time: float, num_bytes: float | None = None, **details: Any
    ) -> None:
        """``num_bytes``: what the op must at least move; the share is of the copy bandwidth."""
        row: dict[str, Any] = {"op": op, "case": case, "us": round(time * 1e6, 2)}
        if num_bytes is not None:
            row["bytes"] = round(num_bytes)
            row["share"] = round(num_bytes / time / self.bandwidth, 4)
        self.rows.append(row | details)
        line = json.dumps(self.rows[-1])
        print(line, flush=True)
        print(line, file=self.file, flush=True)

    def table(self) -> str:
        lines = [self.ROW.format("op", "case", "us", "GB/s", "share", "FA3 us")]
        for row in self.rows:
            speed = f"{row['bytes'] / row['us'] / 1e3:.0f}" if "bytes" in row else ""
            share = f"{row['share']:.2f}" if "share" in row else ""
            flash = f"{row['flash_us']:.1f}" if row.get("flash_us") else ""
            lines.append(
                self.ROW.format(row["op"], row["case"], f"{row['us']:.1f}", speed, share, flash)
            )
        return "\n".join(line.rstrip() for line in lines)
