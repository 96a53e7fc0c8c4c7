# SPDX-License-Identifier: Apache-2.0
"""Page counts: exact sums, bounds, shares; whatever a policy asks for."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvcompress_vllm.compression.allocation import freed_pages, water_fill
from kvcompress_vllm.policies import Evidence, Policy

LAYERS, HEADS, BLOCK = 3, 2, 16


def fill(weights: list[float], total: int, low: int, high: int, base: float = 0.0) -> list[int]:
    most = torch.full((len(weights),), high)
    return water_fill(torch.tensor(weights), torch.tensor(total), low, most, base).tolist()


@pytest.mark.parametrize(
    ("weights", "total", "low", "high", "base", "expected"),
    [
        ([1, 1, 1], 9, 0, 9, 0, [3, 3, 3]),
        ([1, 2, 3], 12, 0, 12, 0, [2, 4, 6]),
        ([1, 1, 1], 10, 0, 9, 0, [4, 3, 3]),  # a tie goes to the first
        ([1, 2, 3], 10, 0, 10, 0, [2, 3, 5]),  # 1.67, 3.33, 5
        ([0, 0, 0], 7, 1, 9, 0, [3, 2, 2]),  # nothing to go by
        ([0, 1, 1], 12, 1, 5, 0, [2, 5, 5]),  # no weight, but nobody else has room
        ([100, 1, 1], 12, 1, 8, 0, [8, 2, 2]),  # the cut of the first goes to the others
        ([100, 1, 1], 10, 3, 8, 0, [4, 3, 3]),  # the floor of the others comes from the first
        ([3, 1], 12, 2, 12, 2, [8, 4]),  # 2 each, then 6 and 2
        ([float("nan"), 1, float("inf")], 6, 1, 6, 0, [1, 4, 1]),
        ([5], 4, 0, 9, 0, [4]),
    ],
)
def test_water_fill(weights, total, low, high, base, expected) -> None:
    assert fill(weights, total, low, high, base) == expected


@given(st.data())
def test_water_fill_is_exact_and_fair(data) -> None:
    count = data.draw(st.integers(1, 40))
    weights = data.draw(st.lists(st.floats(0, 1e6) | st.just(0.0), min_size=count, max_size=count))
    low = data.draw(st.integers(0, 5))
    high = data.draw(st.integers(low, 60))
    base = data.draw(st.floats(0, low))
    total = data.draw(st.integers(count * low, count * high))
    parts = fill(weights, total, low, high, base)
    assert sum(parts) == total and min(parts) >= low and max(parts) <= high
    # Who weighs more never gets less, but for one page of rounding.
    for a, weight_a in zip(parts, weights, strict=True):
        for b, weight_b in zip(parts, weights, strict=True):
            assert weight_a < weight_b or a >= b - 1


def test_rows_are_filled_alone() -> None:
    weights = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    filled = water_fill(weights, torch.tensor([6, 9]), 0, torch.full((2, 2), 9), 0.0)
    assert filled.tolist() == [[2, 4], [6, 3]]


def test_every_part_has_its_own_ceiling() -> None:
    filled = water_fill(torch.ones(3), torch.tensor(12), 1, torch.tensor([2, 9, 9]), 0.0)
    assert filled.tolist() == [2, 5, 5]


@dataclass(frozen=True)
class Shares(Policy):
    layers: tuple[float, ...] | None = None
    heads: tuple[tuple[float, ...], ...] | None = None

    def score(self, evidence: Evidence) -> Tensor:
        return torch.zeros(LAYERS * HEADS, evidence.num_keys)

    def layer_shares(self, evidence: Evidence) -> Tensor | None:
        return None if self.layers is None else torch.tensor(self.layers)

    def head_shares(self, evidence: Evidence, scores: Tensor) -> Tensor | None:
        return None if self.heads is None else torch.tensor(self.heads)


def freed(allocator: str, policy: Policy, blocks: int = 12, kept: int = 4, floor: int = 1,
          lengths: list[list[int]] | None = None):  # fmt: skip
    evidence = Evidence(
        layers=LAYERS, heads=HEADS, group=1, num_keys=blocks * BLOCK, num_kept=kept * BLOCK,
        seq_len=blocks * BLOCK + 3, num_queries=8, num_sinks=4, num_recent=4, scale=1.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    table = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    (pages,) = freed_pages(
        [kept], allocator, policy, evidence, policy.score(evidence), BLOCK, floor, blocks, table
    )
    assert pages.dtype == torch.int32 and int(pages.sum()) == (blocks - kept) * LAYERS * HEADS
    return pages.tolist()


def test_without_shares_all_are_equal() -> None:
    assert freed("global", Shares()) == [48]
    assert freed("layer", Shares()) == [16] * 3
    assert freed("uniform", Shares()) == [8] * 6


def test_layer_shares() -> None:
    """12 blocks kept over three layers; half a block of each head is shielded."""
    policy = Shares(layers=(1.0, 1.0, 4.0))
    # 0.5 + 10.5 / 6 = 2.25, 2.25, 7.5
    assert freed("uniform", policy) == [10, 10, 10, 10, 4, 4]
    # 1 + 21 / 6 = 4.5, 4.5, 15
    assert freed("layer", policy) == [19, 20, 9]
    assert freed("global", policy) == [48]


def test_head_shares_split_their_layer() -> None:
    policy = Shares(heads=((1.0, 1.0), (1.0, 3.0), (0.0, 1.0)))
    # Half a block for each head, and 7 shared: 4 4, 2.25 5.75, 0.5 7.5.
    assert freed("layer", policy) == [8, 8, 10, 6, 11, 5]
    assert freed("uniform", policy) == [8] * 6
    both = Shares(layers=(1.0, 1.0, 4.0), heads=policy.heads)
    assert sum(freed("layer", both)[4:]) == 9


def test_floor_and_ceiling() -> None:
    policy = Shares(layers=(0.0, 0.0, 1.0))
    assert freed("uniform", policy, kept=4, floor=2) == [10, 10, 10, 10, 4, 4]
    assert freed("uniform", policy, kept=10, floor=2) == [3, 3, 3, 3, 0, 0]


def test_heads_that_were_packed_before_have_lengths_of_their_own() -> None:
    """Twelve pages on average; none can keep more than it has."""
    lengths = [[2, 2], [10, 10], [24, 24]]
    even = Shares(layers=(1.0, 1.0, 1.0))
    assert freed("uniform", even, kept=10, lengths=lengths) == [0, 0, 0, 0, 6, 6]
    lengths = [[1, 3], [2, 18], [24, 24]]
    assert freed("layer", even, kept=10, lengths=lengths) == [0, 0, 12]
    heads = Shares(layers=(1.0, 1.0, 1.0), heads=((1.0, 1.0),) * 3)
    assert freed("layer", heads, kept=10, lengths=lengths) == [0, 0, 0, 0, 6, 6]


def test_broken_numbers_are_refused() -> None:
    for kept, floor in ((1, 2), (13, 1)):
        with pytest.raises(RuntimeError, match=f"keep {kept} of 12 blocks with {floor} per head"):
            freed("layer", Shares(), kept=kept, floor=floor)
    with pytest.raises(RuntimeError, match=r"layer_shares .* shape \(2,\), not \(3,\)"):
        freed("layer", Shares(layers=(1.0, 2.0)))
    with pytest.raises(RuntimeError, match=r"head_shares .* shape \(1, 2\), not \(3, 2\)"):
        freed("layer", Shares(heads=((1.0, 2.0),)))
