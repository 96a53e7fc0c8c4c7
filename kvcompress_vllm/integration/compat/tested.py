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
        gpu: the tests that need a GPU.
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
