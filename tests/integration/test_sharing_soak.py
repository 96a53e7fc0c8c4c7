# SPDX-License-Identifier: Apache-2.0
"""Many requests on few documents over HTTP, in a small pool, and kill -9 in the middle.

Two thousand of them: ``python -m benchmarks.soak --documents 6 --kill`` (docs/benchmarks.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak.__main__ import after_kill
from benchmarks.soak.client import ANSWERED, LEFT, Ending
from tests.integration.test_hard_use import environment, soaked

__all__ = ["environment"]


@pytest.mark.timeout(1800)
def test_soak_with_sharing_and_kill_9(tmp_path: Path) -> None:
    report = soaked(
        tmp_path, requests=60, concurrency=20, max_model_len=600, kv_tokens=1400, documents=4,
        kill=True, seed=3,
    )  # fmt: skip
    left = report["outcomes"].total()
    assert 10 <= left <= 30, "what the first engine did not answer"
    # The second engine shares, too: 10 of 27, and fewer the later the first one died.
    assert report["kv_compress:shared_hits_total"] >= left // 6
    assert len(report["by_kind"]) >= 4


def test_what_is_wrong_after_a_kill_is_seen() -> None:
    good = [Ending("a", ANSWERED), Ending("b", LEFT)]
    lost = [Ending("c", "HTTP 500"), Ending("d", "connection: ServerDisconnectedError")]
    assert after_kill(good + lost, 4) == ([], 2)
    hangs = Ending("c", "hangs: no end in 900 s")
    problems, _ = after_kill([*good, hangs, lost[1]], 4)
    assert problems == ["after the kill: c: hangs: no end in 900 s"]
    assert after_kill(good + lost[:1], 4)[0] == ["after the kill: 3 of 4 requests ended"]
    assert "2 of 6 were good" in after_kill(good + 4 * lost[:1], 6)[0][0]
    assert "2 of 2 were good" in after_kill(good, 2)[0][0]
