# SPDX-License-Identifier: Apache-2.0
"""What the CPU platform does around a draft model's steps, against vLLM's kernels told in loops."""

from __future__ import annotations

import random

import pytest
import torch

from kvcompress_vllm.integration.cpu.drafting import accepted_ends, advance, next_tokens


@pytest.mark.parametrize("seed", range(20))
def test_next_tokens(seed: int) -> None:
    source = random.Random(seed)
    rows, drafts = source.randrange(1, 6), source.randrange(1, 5)
    sampled = torch.full((rows, drafts + 1), -1)
    discarded = torch.tensor([source.random() < 0.3 for _ in range(rows + 2)])
    for row in sampled:
        for i in range(source.randrange(drafts + 2)):
            row[i] = source.randrange(50)
    backup = torch.arange(100, 100 + rows + 2)
    token, count = torch.full((2, rows), -7)
    next_tokens(sampled, discarded, backup, token, count, 50, drafts + 1, rows)
    for r in range(rows):
        valid = [] if discarded[r] else [t for t in sampled[r].tolist() if t != -1]
        assert count[r] == len(valid)
        assert token[r] == (valid[-1] if valid else backup[r])


def test_accepted_ends() -> None:
    """Rows with four drafted tokens, none (a prompt of three), and two."""
    ends, valid = torch.tensor([4, 4, 6]), torch.tensor([2, 1, 3])
    last, rejected = torch.zeros(2, 3, dtype=torch.int64)
    accepted_ends(ends, valid, torch.tensor([0, 5, 8, 11]), last, rejected, 3)
    assert rejected.tolist() == [3, 0, 0] and last.tolist() == [1, 7, 10]


def test_advance() -> None:
    positions = torch.tensor(
        [15, 30, 3]
    )  # to another block; the last that there may be; within one
    lengths = torch.tensor([16, 31, 4], dtype=torch.int32)
    table = torch.tensor([[7, 9], [5, 6], [2, 0]], dtype=torch.int32)
    slots = torch.zeros(5, dtype=torch.int64)
    advance(positions, table, lengths, positions, slots, 16, 31, -1)
    assert positions.tolist() == [16, 0, 4]
    assert slots.tolist() == [9 * 16, -1, 2 * 16 + 4, -1, -1]
    assert lengths.tolist() == [17, 1, 5]
