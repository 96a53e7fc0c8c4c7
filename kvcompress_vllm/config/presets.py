# SPDX-License-Identifier: Apache-2.0
"""Configurations that ship with the package, by name: the files of ``configs/``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "presets"
"""In a source tree a link to ``configs/``, in an installed package the files themselves."""


def names() -> tuple[str, ...]:
    """The presets that ``--kv-compress NAME`` finds."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def find(name: str) -> Path | None:
    """The file of a preset; None: there is none of that name. Policies are spelt with ``_``, files
    with ``-``; either is found."""
    name = name.replace("_", "-")
    return FOLDER / f"{name}.yaml" if name in names() else None
