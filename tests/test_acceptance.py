# SPDX-License-Identifier: Apache-2.0
"""A warning where compression costs acceptance."""

from __future__ import annotations

import pytest

from kvcompress_vllm.reporting.acceptance import ENOUGH, Acceptance


@pytest.mark.parametrize("packed, warns", [(0.49, False), (0.48, False), (0.47, True), (0.0, True)])
def test_it_warns_once_of_less(packed: float, warns: bool) -> None:
    told: list[str] = []
    acceptance = Acceptance(told.append)
    for _ in range(3 * ENOUGH // 100):
        acceptance.verified(False, 100, 60)
        acceptance.verified(True, 100, round(100 * packed))
    assert len(told) == warns
    if warns:
        assert told[0].startswith(f"{packed:.0%} of {ENOUGH} drafted tokens of packed requests")
        assert f"and 60% of {ENOUGH} of others" in told[0]


@pytest.mark.parametrize("side", [False, True])
def test_few_are_not_compared(side: bool) -> None:
    told: list[str] = []
    acceptance = Acceptance(told.append)
    acceptance.verified(side, 10 * ENOUGH, 0 if side else 10 * ENOUGH)
    acceptance.verified(not side, ENOUGH - 1, 0 if not side else ENOUGH - 1)
    assert not told
