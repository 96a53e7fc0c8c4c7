# SPDX-License-Identifier: Apache-2.0
"""Decode next to FlashAttention 3, as shares of the copy bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {1: "skewed heads (log-normal, sigma 1)", 0: "even heads"}


def plot_decode(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One panel per spread of the head lengths; small batches on the left."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed", flush=True)
        return
    counts = [sum(row["sigma"] == sigma for row in rows) for sigma in TITLES]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, width_ratios=[max(1, count) for count in counts])
    for panel, (sigma, title) in zip(panels, TITLES.items(), strict=True):
        cases = sorted((row for row in rows if row["sigma"] == sigma), key=lambda row: row["bytes"])
        places = range(len(cases))
        panel.bar([x - 0.2 for x in places], [row["share"] for row in cases], 0.4, label="ours")
        flash = [row["share"] * row["us"] / (row["flash_us"] or float("inf")) for row in cases]
        if any(flash):
            panel.bar([x + 0.2 for x in places], flash, 0.4, label="FlashAttention 3")
        panel.set_xticks(places, [f"{row['requests']} x\n{row['mean']}" for row in cases])
        panel.set_title(title)
        panel.set_ylim(0, 1)
        panel.grid(axis="y", alpha=0.3)
    figure.supxlabel("requests x mean keys per head")
    panels[0].set_ylabel("share of the copy bandwidth")
    panels[0].legend(loc="upper left")
    figure.savefig(path, dpi=150)
    print(f"plot: {path}", flush=True)
