# SPDX-License-Identifier: Apache-2.0
"""Policies of other packages, as if they were installed."""

from __future__ import annotations

import os
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from kvcompress_vllm.policies import registry


def install(monkeypatch: pytest.MonkeyPatch, **found: str) -> list[str]:
    """Have these entry points, ``name="module:Class"``, and nothing loaded of them.

    Returns:
        Our group, as often as it was asked for; grows with every look at what is installed.
    """
    entries = [metadata.EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in
               found.items()]  # fmt: skip
    asked: list[str] = []
    stock = metadata.entry_points

    def entry_points(**wanted: str) -> metadata.EntryPoints:
        if wanted.get("group") != registry.ENTRY_POINTS:
            return stock(**wanted)  # vLLM finds its plugins so
        asked.append(wanted["group"])
        return metadata.EntryPoints(entries)

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    for name in ("_installed", "_load"):
        monkeypatch.setattr(registry, name, cache(getattr(registry, name).__wrapped__))
    return asked


def package(folder: Path, **found: str) -> str:
    """A package's metadata in ``folder`` with these entry points.

    Returns:
        The PYTHONPATH with which a process finds it.
    """
    metadata_of = folder / "faulty_policies-1.0.dist-info"
    metadata_of.mkdir()
    (metadata_of / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: faulty-policies\nVersion: 1.0\n"
    )
    lines = [f"[{registry.ENTRY_POINTS}]", *(f"{name} = {value}" for name, value in found.items())]
    (metadata_of / "entry_points.txt").write_text("\n".join(lines) + "\n")
    paths = [str(folder), str(Path(__file__).parents[2]), *filter(None, [os.getenv("PYTHONPATH")])]
    return os.pathsep.join(paths)


def install_for_all(folder: Path, monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """As :func:`install`, for every process that is started from now on."""
    monkeypatch.setenv("PYTHONPATH", package(folder, **found))
    monkeypatch.syspath_prepend(folder)
    for name in ("_installed", "_load"):
        monkeypatch.setattr(registry, name, cache(getattr(registry, name).__wrapped__))
