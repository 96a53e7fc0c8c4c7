# SPDX-License-Identifier: Apache-2.0
"""Which keys Diverse takes first. What it keeps in all: test_parity.py."""

from __future__ import annotations

import pytest
import torch

from kvcompress_vllm.policies.diverse import _first


@pytest.mark.parametrize("count", [1, 2, 17, 99, 100])
def test_the_first_of_ties(count: int) -> None:
    """As a stable sort has them; with rows of ties, of one value, and shielded beyond ``count``."""
    scores = torch.randint(0, 7, (6, 100), generator=torch.Generator().manual_seed(count)).float()
    scores[0], scores[1] = torch.rand(100), 3.0
    scores[2, 20:], scores[3, :80] = float("-inf"), float("-inf")
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    wanted = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
    assert _first(scores, count).equal(wanted)
