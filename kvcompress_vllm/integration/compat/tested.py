# SPDX-License-Identifier: Apache-2.0
"""What was run with which release of vLLM; ``docs/releases.md`` shows it as a table.

``make releases`` reads and writes ``tested.json``; what ran on a GPU is entered by hand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("tested.json")


@dataclass
class Tested:
    """Of one release; empty: not run.

    Attributes:
        torch: the version that this vLLM brings.
        contract: the contract by AST.
        cpu: ``tests/releases/engine.py`` on a machine without GPU.
        suite: all tests on a machine without GPU.
        gpu: the tests that need a GPU, or what of them was run.
    """

    torch: str
    contract: str = ""
    cpu: str = ""
    suite: str = ""
    gpu: str = ""

    def describe(self) -> str:
        """In words."""
        return ", ".join(
            f"{what} {result or 'not run'}"
            for what, result in (
                ("contract", self.contract),
                ("engine on CPU", self.cpu),
                ("all tests on CPU", self.suite),
                ("GPU", self.gpu),
            )
        )


def load() -> dict[str, Tested]:
    """By release, oldest first."""
    return {release: Tested(**row) for release, row in json.loads(FILE.read_text()).items()}


TESTED = load()


def supported() -> str:
    """From the first to the last of :data:`TESTED`, later patches of it included: ``>=0.26,<0.34``;
    the same as in ``pyproject.toml``."""
    (first, *_, last) = (tuple(map(int, release.split("."))) for release in TESTED)
    return f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"
