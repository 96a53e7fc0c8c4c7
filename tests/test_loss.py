# SPDX-License-Identifier: Apache-2.0
"""Loss curves against a slow literal computation, and what is read off them."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kvcompress_vllm import ops
from kvcompress_vllm.compression import compressor as compressor_module
from kvcompress_vllm.compression import loss
from kvcompress_vllm.compression.loss import curve_points
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records import budget
from kvcompress_vllm.records.curve import LossCurve
from tests.test_compressor import SLOTS, B, D, G, L, Paged, W

GROUPS = {"global": 1, "layer": L, "uniform": SLOTS}


def literal_curve(
    heads: list[list[float]], recent: int, sinks: int, floor: int, groups: int, points: list[int]
) -> list[float]:
    """``heads``: the candidate scores of each head, in token order."""
    candidates = [
        [s for j, s in enumerate(head) if sinks <= j < len(head) - recent] for head in heads
    ]
    lowest = min([0.0] + [s for head in candidates for s in head])
    total = math.fsum(s - lowest for head in candidates for s in head)
    pages: list[list[tuple[float, int, int, float]]] = [[] for _ in range(groups)]
    for index, (head, open_) in enumerate(zip(heads, candidates, strict=True)):
        order = sorted(open_)
        for e in range(len(head) // B - floor):
            page = order[e * B : (e + 1) * B]
            mass = math.fsum(s - lowest for s in page)
            pages[index * groups // len(heads)].append((page[-1], index, e, mass))
    mean = sum(map(len, heads)) // B // len(heads)
    result = []
    for blocks in points:
        free = (mean - blocks) * len(heads) // groups
        gone = [page for group in pages for page in sorted(group)[:free]]
        result.append(math.fsum(page[3] for page in gone) / total)
    return result


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
@pytest.mark.parametrize("policy", ["kv_compress", "keydiff"])  # keydiff: scores below 0
def test_reports_equal_a_literal_computation(
    allocator: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First compression, and again with heads of different length."""
    torch.manual_seed(3)
    config = KVCompressConfig(policy=policy, window=W, pool=1, recent=9, allocator=allocator)
    paged = Paged(config)
    scored: list[tuple[torch.Tensor, ...]] = []
    stock = ops.select_pages
    monkeypatch.setattr(
        compressor_module.ops, "select_pages", lambda *args: scored.append(args) or stock(*args)
    )
    ragged = False
    for num_new, kept in [(333, 5), (70, 6), (1600, 12), (200, 9)]:
        vectors = torch.randn(num_new, SLOTS, 2 * D) * torch.linspace(0.3, 4, SLOTS)[:, None]
        # Differently similar to each other, for keydiff.
        paged.append(vectors + torch.arange(SLOTS)[:, None] / 4)
        fresh = paged.num_tokens // B - paged.covered
        lengths = [fresh] * SLOTS
        if paged.kept:
            lengths = [int(n) + fresh for n in paged.state.num_pages[2].flatten()]
        (report,) = paged.compress(torch.randn(W, SLOTS, G, D), kept)
        scores = scored.pop()[0].flatten().tolist()
        heads = []
        for length in lengths:
            heads.append(scores[: length * B])
            scores = scores[length * B :]
        assert not scores
        recent = budget.num_recent(config.recent, paged.num_tokens, paged.covered, B)
        floor = resolve(config).floor_pages(B)
        points = report.curve.blocks
        expected = literal_curve(
            heads, recent, config.sinks, floor, GROUPS[allocator], points
        )  # fmt: skip
        assert report.curve.lost == pytest.approx(expected, abs=1e-6)
        assert report.lost == pytest.approx(expected[points.index(kept)], abs=1e-6)
        assert points[0] == floor and points[-1] * SLOTS == sum(lengths)
        assert report.curve.lost[-1] == 0 < report.lost < report.curve.lost[0] < 1
        assert report.kept_pages == paged.state.num_pages[2].tolist()
        assert report.milliseconds > 0
        ragged = ragged or len(set(lengths)) > 1
    assert ragged == (allocator != "uniform")


def test_requests_of_a_batch_have_their_own_curves() -> None:
    torch.manual_seed(5)
    config = KVCompressConfig(window=W, policy="knorm")
    alone = [_batch(config, [name]) for name in "ab"]
    both = _batch(config, ["a", "b"])
    assert [report.request_id for report in both] == ["a", "b"]
    for (one,), two in zip(alone, both, strict=True):
        assert (one.curve, one.kept_pages) == (two.curve, two.kept_pages)
    assert both[0].curve != both[1].curve


def _batch(config: KVCompressConfig, names: list[str]) -> list:
    from kvcompress_vllm.records.plan import Compression

    torch.manual_seed(5)
    paged = Paged(config)
    paged.pages.normal_()
    items = {
        "a": Compression("a", 0, 0, 500, 0, 0, 31, list(range(1, 33)), list(range(150, 154))),
        "b": Compression("b", 1, 1, 900, 0, 0, 56, list(range(40, 97)), list(range(160, 163))),
    }
    pending = paged.compressor.run([items[name] for name in names])
    return [report for batch in pending for report in batch.collect()]


def test_pieces_of_heads_are_sorted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(6, 64)
    shielded = torch.zeros(1, 64, dtype=torch.bool)
    shielded[:, :3] = True
    whole = loss.page_masses(scores, shielded, B)
    monkeypatch.setattr(loss, "KEYS_AT_ONCE", 130)
    parts = loss.page_masses(scores, shielded, B)
    assert all(a.equal(b) for a, b in zip(whole, parts, strict=True))
    assert whole[0][:, -1].isinf().all() and whole[1].ge(0).all()


def test_the_floor_of_a_cheap_head_makes_others_pay() -> None:
    scores = torch.tensor([[1.0] * 64, [10.0] * 64])
    pages = loss.page_masses(scores, torch.zeros(1, 64, dtype=torch.bool), B)
    lost = loss.loss_at(*pages, 4, 2, torch.tensor([[2], [3]]))
    assert lost.tolist() == pytest.approx([32 / 704, 192 / 704])
    # A head of three pages has one to give; the fourth column of pages is absent there.
    shielded = torch.zeros(2, 64, dtype=torch.bool)
    shielded[0, :16] = True
    pages = loss.page_masses(scores, shielded, B)
    lost = loss.loss_at(*pages, torch.tensor([3, 4]), 2, torch.tensor([[1], [2]]))
    assert lost.tolist() == pytest.approx([16 / 688, 176 / 688])


def test_what_keys_are_worth_need_not_be_their_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages go in the order of the scores, and what they are worth is lost."""
    scores, worth = torch.randn(6, 64), torch.rand(6, 64)
    shielded = torch.zeros(6, 64, dtype=torch.bool)
    shielded[:, 60:] = True
    shielded[5] = True  # nothing of this head is open
    worth[5] = -torch.inf
    order = scores[:5, :60].sort(-1).indices
    wanted = torch.cat([worth[:5].gather(-1, order), torch.zeros(5, 4)], 1).view(5, -1, B).sum(-1)
    for pieces in (1 << 20, 130):
        monkeypatch.setattr(loss, "KEYS_AT_ONCE", pieces)
        costs, masses = loss.page_masses(scores, shielded, B, worth)
        assert costs.equal(loss.page_masses(scores, shielded, B)[0])
        torch.testing.assert_close(masses[:5], wanted.double(), rtol=1e-6, atol=1e-6)
        assert masses[5].eq(0).all()


def test_no_mass_is_no_loss() -> None:
    costs, masses = loss.page_masses(torch.zeros(2, 64), torch.zeros(1, 64, dtype=torch.bool), B)
    assert loss.loss_at(costs, masses, 4, 1, torch.tensor([[4]])).tolist() == [0]


@pytest.mark.parametrize("seed", range(20))
def test_points(seed: int) -> None:
    choice = random.Random(seed)
    floor = choice.randint(1, 20)
    candidates = floor + choice.randint(0, 10_000 if seed % 2 else 80)
    kept = choice.randint(floor, candidates)
    points = curve_points(candidates, floor, kept)
    assert points == sorted(set(points)) and len(points) <= loss.POINTS + 1
    assert points[0] == floor and points[-1] == candidates and kept in points
    if candidates - floor < loss.POINTS:
        assert points == list(range(floor, candidates + 1))


CURVE = LossCurve([2, 3, 5, 10], [0.6, 0.4, 0.1, 0.0])


@pytest.mark.parametrize(
    ("blocks", "lost"), [(1, 0.6), (2, 0.6), (2.5, 0.5), (4, 0.25), (5, 0.1), (9, 0.02), (12, 0)]
)
def test_between_the_points(blocks: float, lost: float) -> None:
    assert CURVE.lost_at(blocks) == pytest.approx(lost)


@pytest.mark.parametrize(
    ("mass", "blocks"),
    [(1, 10), (0.999, 10), (0.98, 9), (0.9, 5), (0.85, 5), (0.75, 4), (0.6, 3), (0.3, 2)],
)
def test_the_fewest_blocks_that_keep_a_mass(mass: float, blocks: int) -> None:
    assert CURVE.fewest_blocks(mass) == blocks
    assert CURVE.lost_at(blocks) <= 1 - mass + 1e-9


def test_fewest_blocks_of_a_flat_curve() -> None:
    assert LossCurve([3, 4, 5], [0.0, 0.0, 0.0]).fewest_blocks(1) == 3
    assert LossCurve([7], [0.0]).fewest_blocks(0.5) == 7
