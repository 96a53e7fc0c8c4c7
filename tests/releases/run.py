# SPDX-License-Identifier: Apache-2.0
"""Run every supported release of vLLM on this machine, and write the table in docs/releases.md.

    python -m tests.releases.run [RELEASE...]

For each: the contract by AST, and ``tests/releases/engine.py``. One environment per version of
torch, with the newest release of that version; the others are run from their unpacked Python files
in front of it, which saves most of the disk (8 GB an environment) and of the time. CPU only: the
compiled libraries are not unpacked. Everything lies in ``.releases/``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PathDistribution
from pathlib import Path

from kvcompress_vllm.integration.compat import tested
from kvcompress_vllm.integration.compat.contract import numbers

ROOT = Path(__file__).parents[2]
WORK = ROOT / ".releases"
TABLE = ROOT / "docs" / "releases.md"
BEGIN, END = "<!-- table: make releases -->\n", "<!-- end of table -->\n"


def main(releases: list[str]) -> int:
    rows = tested.load()
    unknown = set(releases) - rows.keys()
    if unknown:
        raise SystemExit(f"not among {', '.join(rows)}: {', '.join(sorted(unknown))}")
    results: dict[str, bool] = {}
    for torch in dict.fromkeys(row.torch for row in rows.values()):
        line = [release for release, row in rows.items() if row.torch == torch]
        wanted = [release for release in line if not releases or release in releases]
        if not wanted:
            continue
        sources = {release: unpack(release) for release in line}
        python = environment(torch, line[-1], sources.values())
        for release in wanted:
            row = rows[release]
            row.contract = run(python, sources[release], "kvcompress_vllm", "doctor")
            row.cpu = run(python, sources[release], "tests.releases.engine")
            results[release] = row.contract == row.cpu == "passed"
            print(f"vLLM {release}: contract {row.contract}, engine on CPU {row.cpu}", flush=True)
            write(rows)
    return int(not all(results.values()))


def unpack(release: str) -> Path:
    """The Python files of a release."""
    folder = WORK / f"v{release}"
    if (folder / ".done").exists():
        return folder
    wheels = WORK / "wheels"
    found = list(wheels.glob(f"vllm-{release}-*.whl"))
    if not found:
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", wheels, f"vllm=={release}"]
        subprocess.run([sys.executable, "-m", *command], check=True)
        found = list(wheels.glob(f"vllm-{release}-*.whl"))
    with zipfile.ZipFile(found[0]) as archive:
        names = [n for n in archive.namelist() if not n.endswith((".so", ".h", ".cuh"))]
        archive.extractall(folder, names)
    (folder / ".done").touch()
    return folder


def environment(torch: str, newest: str, sources: Iterable[Path]) -> Path:
    """Python of the environment in which all releases on one version of torch run."""
    folder = WORK / f"torch-{torch}"
    python = folder / "bin" / "python"
    if (folder / ".done").exists():
        return python
    # One release pins transformers from below, another from above.
    pins = {f"transformers{pin}" for source in sources for pin in transformers_pins(source)}
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    build = ["setuptools>=77,<82", "wheel", "ninja"]
    subprocess.run([*pip, "--upgrade", "pip", *build], check=True)
    wheels = ["--find-links", WORK / "wheels"]
    subprocess.run([*pip, *wheels, f"vllm=={newest}", *sorted(pins)], check=True)
    subprocess.run([*pip, "--no-build-isolation", "--editable", ROOT], check=True)
    (folder / ".done").touch()
    return python


def transformers_pins(source: Path) -> list[str]:
    """What a release asks of transformers: ``[">=5.16.1,<5.20.0"]``."""
    (metadata,) = source.glob("vllm-*.dist-info")
    requirements = PathDistribution(metadata).requires or []
    return [m[1] for r in requirements if (m := re.match(r"transformers\s*([<>=!][^;\s]*)", r))]


def run(python: Path, source: Path, *module: str) -> str:
    """``passed`` or ``failed``; what was printed lies beside the source."""
    log = WORK / f"{source.name}-{module[-1]}.log"
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT}"}
    with log.open("w") as file:
        result = subprocess.run(
            [python, "-m", *module], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    return "failed" if result.returncode else "passed"


def write(rows: dict[str, tested.Tested]) -> None:
    """The table, for programs and for people."""
    lines = ",\n".join(f"  {json.dumps(r)}: {json.dumps(asdict(row))}" for r, row in rows.items())
    tested.FILE.write_text(f"{{\n{lines}\n}}\n")
    before, rest = TABLE.read_text().split(BEGIN)
    after = rest.split(END)[1]
    TABLE.write_text(before + BEGIN + table(rows) + END + after)


def table(rows: dict[str, tested.Tested]) -> str:
    """As in docs/releases.md."""
    lines = [
        "| vLLM | torch | contract | engine on CPU | all tests on CPU | GPU |",
        "|" + " --- |" * 6,
    ]
    for release, row in sorted(rows.items(), key=lambda item: numbers(item[0])):
        cells = [result or "not run" for result in (row.contract, row.cpu, row.suite, row.gpu)]
        lines.append(f"| {' | '.join([release, row.torch, *cells])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
