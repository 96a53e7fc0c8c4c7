# SPDX-License-Identifier: Apache-2.0
"""Record what every release of vLLM answers, for the contract (``compat/recorded.json``).

    python -m tests.releases.record WHEEL_OR_FOLDER...

Give all releases that are supported; a folder holds ``vllm/`` and is named ``vVERSION``. Needed
when ``integration/`` relies on something new, and for a new release.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kvcompress_vllm.integration.compat import contract, source


def main(paths: list[str]) -> int:
    found = [
        source.wheel(p) if p.suffix == ".whl" else source.folder(p, p.name.removeprefix("v"))
        for p in map(Path, paths)
    ]
    found.sort(key=lambda s: contract.numbers(s.version))
    answers: dict[str, list[list[str | None]]] = {}
    for question in sorted(contract.questions()):
        history: list[list[str | None]] = []
        for vllm in found:
            answer = vllm.answer(question)
            if not history or history[-1][1] != answer:
                history.append([vllm.version, answer])
        if any(answer is not None for _, answer in history):
            answers[question] = history
    lines = ",\n".join(f"{json.dumps(q)}: {json.dumps(h)}" for q, h in answers.items())
    releases = json.dumps([s.version for s in found])
    contract.RECORDED.write_text(f'{{"releases": {releases},\n"answers": {{\n{lines}\n}}}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
