# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools

import pytest
import torch
from cases import assert_same_bits, page_starts, uneven
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout
from kvcompress_vllm.ops import reference

NAMES = ("kept_pages", "kept_first", "kept_keys")


def tables(rows, layers, heads, block_size):
    """Arguments that say where the candidates are; ``rows`` is (packed, covered, new_covered).

    Candidates of a request start one page after those of the one before: the gap is poison.
    """
    num_states = len(rows) + 1
    num_pages = torch.full((num_states, layers, heads), 1 << 30, dtype=torch.int32)
    first_page, covered = num_pages.clone(), torch.full((num_states,), 1 << 30, dtype=torch.int32)
    state_slot = torch.full((len(rows),), -1, dtype=torch.int32)
    for r, (packed, old, _) in enumerate(rows):
        if packed is not None:
            slot = num_states - 1 - r
            state_slot[r] = slot
            num_pages[slot] = torch.tensor(packed).view(layers, heads)
            first_page[slot] = layout.exclusive_cumsum(num_pages[slot])
            covered[slot] = old
    new_covered = torch.tensor([new for _, _, new in rows], dtype=torch.int32)
    start, end = page_starts(
        sum(packed or ()) + (new - old) * layers * heads for packed, old, new in rows
    )
    scores = torch.full((end, block_size), float("-inf"))
    return scores, start, state_slot, num_pages, first_page, covered, None, 0, new_covered


def pages_per_head(rows, slots):
    return [[p + new - old for p in packed or [0] * slots] for packed, old, new in rows]


def feasible(counts, groups, floor_pages, part):
    """``num_freed``: about ``part`` of what every group of heads can free."""
    rows = []
    for head_pages in counts:
        size = len(head_pages) // groups
        can = [
            sum(max(0, n - floor_pages) for n in head_pages[a * size : (a + 1) * size])
            for a in range(groups)
        ]
        rows.append([round(n * part) for n in can])
    return torch.tensor(rows, dtype=torch.int32).view(len(counts), groups)


def problem(
    rows, layers, heads, block_size, groups, scores_of, part=0.6, sinks=0, recent=0, floor=1
):
    """A complete list of arguments; ``scores_of(n)`` makes the scores of n pages."""
    slots = layers * heads
    scores, start, *state = tables(rows, layers, heads, block_size)
    counts = pages_per_head(rows, slots)
    for begin, head_pages in zip(start.tolist(), counts, strict=True):
        n = sum(head_pages)
        scores[begin : begin + n] = scores_of(n)
    freed = feasible(counts, groups, floor, part)
    kept = sum(map(sum, counts)) - int(freed.sum())
    num_recent = torch.tensor([recent // (1 + r % 2) for r in range(len(rows))], dtype=torch.int32)
    return [scores, start, *state, freed, num_recent, sinks, floor, kept]


def run(device, args):
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    return [t.cpu() for t in ops.select_pages(*moved)]


def check(device, args):
    actual = run(device, args)
    expected = reference.select_pages(*args)
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert a.shape == e.shape and torch.equal(a, e), name
    return actual


def distributions(block_size):
    def special(n):
        values = [float("nan"), float("inf"), float("-inf"), -0.0, 0.0, 1e-42, -1e-42, 3.4e38, 1.0]
        return torch.tensor(values)[torch.randint(len(values), (n, block_size))]

    return {
        "random": lambda n: torch.randn(n, block_size),
        "ties": lambda n: torch.randint(-2, 3, (n, block_size)).float(),
        "equal": lambda n: torch.zeros(n, block_size),
        "special": special,
        "nan": lambda n: torch.full((n, block_size), float("nan")),
    }


def hostile(slots):
    return [
        (None, 0, 6),
        (uneven(2 * slots, slots), 4, 6),
        (None, 0, 0),  # nothing to choose from
        (uneven(slots, slots), 1, 1),  # packed pages alone
        ([2] * slots, 3, 7),
    ]


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "special", "nan"])
@pytest.mark.parametrize("form", ["all", "layer", "head"])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("shields", [(0, 0), (4, 0), (0, 9), (4, 9)])
def test_hostile_batch(device, kind, form, block_size, shields):
    layers, heads = 3, 2
    groups = {"all": 1, "layer": layers, "head": layers * heads}[form]
    floor = -(-sum(shields) // block_size)
    for part in (0, 0.5, 1):
        args = problem(
            hostile(layers * heads), layers, heads, block_size, groups,
            distributions(block_size)[kind], part, *shields, floor,
        )  # fmt: skip
        check(device, args)


def test_long_head(device):
    """Thousands of keys per head, and many ties."""
    scores = distributions(16)["ties"]
    check(device, problem([(None, 0, 300)], 2, 2, 16, 1, scores, 0.75, 4, 32, 3))


def test_no_requests(device):
    check(device, problem([], 2, 2, 16, 1, distributions(16)["random"]))


def test_one_layer_one_head(device):
    check(device, problem([(None, 0, 5)], 1, 1, 8, 1, distributions(8)["random"]))


@pytest.mark.parametrize("form", ["all", "layer", "head"])
@pytest.mark.parametrize("seed", range(6))
def test_against_every_possible_split(device, form, seed):
    """Tiny cases, by brute force: no split of the freed pages over the heads is cheaper, and every
    head keeps its best keys. Shares no code with the reference."""
    torch.manual_seed(seed)
    layers, heads, block_size, pages, floor = 2, 2, 2, 3, seed % 2
    slots = layers * heads
    groups = {"all": 1, "layer": layers, "head": slots}[form]

    def few_values(n):
        return torch.randint(0, 8, (n, block_size)).float()

    rows = [(None, 0, pages)]
    args = problem(rows, layers, heads, block_size, groups, few_values, 0.5, floor=floor)
    kept_pages, _, kept_keys = run(device, args)
    scores = args[0][1 : 1 + pages * slots].view(slots, pages * block_size)
    ascending = scores.sort(-1).values
    freed = args[9][0].tolist()
    size = slots // groups

    def cost(split):
        return sum(
            float(ascending[h, (e + 1) * block_size - 1])
            for h, lost in enumerate(split)
            for e in range(lost)
        )

    splits = [
        split
        for split in itertools.product(range(pages - floor + 1), repeat=slots)
        if [sum(split[a * size : (a + 1) * size]) for a in range(groups)] == freed
    ]
    chosen = tuple((pages - kept_pages.flatten()).tolist())
    assert chosen in splits
    assert cost(chosen) == min(map(cost, splits))
    position = 0
    for h, lost in enumerate(chosen):
        n = pages - lost
        keys = kept_keys[position : position + n].flatten().tolist()
        position += n
        assert keys == sorted(set(keys))
        # Of equal scores the later key stays.
        best = sorted(range(pages * block_size), key=lambda k: (float(scores[h, k]), k))
        assert set(keys) == set(best[lost * block_size :])


def test_ties_break_by_layer_head_and_page(device):
    """All costs equal: the first heads lose their pages first, and each its first keys."""
    args = problem([(None, 0, 3)], 2, 2, 4, 1, lambda n: torch.zeros(n, 4), 0.5, floor=1)
    kept_pages, _, kept_keys = run(device, args)
    assert kept_pages.flatten().tolist() == [1, 1, 3, 3]
    assert kept_keys[0].tolist() == [8, 9, 10, 11]


def test_negative_zero_equals_zero(device):
    args = problem([(None, 0, 2)], 1, 2, 2, 1, lambda n: torch.zeros(n, 2), 0.5, floor=0)
    args[0][1:] = torch.tensor([[0.0, 0.0], [-0.0, 0.0], [-0.0, -0.0], [-0.0, -0.0], [9, 9]])
    args[9] = torch.tensor([[2]], dtype=torch.int32)
    args[-1] = 2
    kept_pages, _, _ = check(device, args)
    assert kept_pages.flatten().tolist() == [0, 2]


@st.composite
def problems(draw):
    layers, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slots, block_size = layers * heads, draw(st.sampled_from([1, 2, 8, 16]))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        packed = None
        old = 0
        if draw(st.booleans()):
            blocks = draw(st.integers(1, 2))
            packed = [0] * slots
            for _ in range(blocks * slots):
                packed[draw(st.integers(0, slots - 1))] += 1
            old = blocks + draw(st.integers(0, 2))
        rows.append((packed, old, old + draw(st.integers(0, 4))))
    groups = draw(st.sampled_from(sorted({1, layers, slots})))
    sinks, recent = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    floor = -(-(sinks + recent) // block_size) + draw(st.integers(0, 1))
    kind = draw(st.sampled_from(["random", "ties", "special"]))
    part = draw(st.floats(0, 1))
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    scores = distributions(block_size)[kind]
    return problem(rows, layers, heads, block_size, groups, scores, part, sinks, recent, floor)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(args=problems())
def test_properties(device, args):
    scores, _, state_slot, num_pages, _, covered, *rest = args
    _, _, new_covered, freed, recent, sinks, floor, _ = rest
    kept_pages, kept_first, kept_keys = check(device, args)
    block_size, groups = scores.shape[1], freed.shape[1]
    flat = kept_pages.flatten()
    assert torch.equal(kept_first.flatten(), (flat.cumsum(0) - flat).int())
    for r, slot in enumerate(state_slot.tolist()):
        packed = (
            num_pages[slot].flatten() if slot >= 0 else torch.zeros_like(num_pages[0]).flatten()
        )
        had = packed + int(new_covered[r]) - (int(covered[slot]) if slot >= 0 else 0)
        lost = had - kept_pages[r].flatten()
        # Exact counts, per group; nobody falls below the floor unless it was there already.
        assert torch.equal(lost.view(groups, -1).sum(-1), freed[r].long())
        assert (kept_pages[r].flatten() >= had.clamp(max=floor)).all()
        for n, count, first in zip(
            had.tolist(), kept_pages[r].flatten().tolist(), kept_first[r].flatten().tolist(),
            strict=True,
        ):  # fmt: skip
            keys = kept_keys[first : first + count].flatten().tolist()
            everything = range(n * block_size)
            assert keys == sorted(set(keys)) and set(keys) <= set(everything)
            shielded = {*everything[:sinks], *everything[max(0, n * block_size - int(recent[r])) :]}
            assert shielded <= set(keys)


@pytest.mark.parametrize("seed", range(3))
def test_heads_may_be_renumbered(device, seed):
    """With distinct scores, permuting the heads permutes the result."""
    torch.manual_seed(seed)
    slots, pages, block_size = 6, 5, 8

    def distinct(n):
        return torch.randperm(n * block_size).float().view(n, block_size)

    args = problem([(None, 0, pages)], 2, 3, block_size, 1, distinct)
    order = torch.randperm(slots)
    moved = list(args)
    moved[0] = args[0].clone()
    moved[0][1:-1] = args[0][1:-1].view(slots, pages, block_size)[order].flatten(0, 1)
    before, after = run(device, args), run(device, moved)
    assert torch.equal(after[0].flatten(), before[0].flatten()[order])
    split = [result[2].split(result[0].flatten().tolist()) for result in (before, after)]
    for place, head in enumerate(order.tolist()):
        assert torch.equal(split[1][place], split[0][head])


def test_poison_between_requests_does_not_matter(device):
    args = problem(hostile(4), 2, 2, 16, 1, distributions(16)["random"])
    before = run(device, args)
    start, counts = args[1].tolist(), pages_per_head(hostile(4), 4)
    owned = torch.zeros(len(args[0]), dtype=torch.bool)
    for begin, head_pages in zip(start, counts, strict=True):
        owned[begin : begin + sum(head_pages)] = True
    args[0] = torch.where(owned[:, None], args[0], float("nan"))
    for a, b in zip(run(device, args), before, strict=True):
        assert_same_bits(a, b)


# num_freed per group of 12 pages that can be freed, and how far num_kept_pages is off.
INFEASIBLE = [
    ([13, 0], 0), ([-1, 1], 0), ([0, 13], 0), ([2, 2], 1), ([2, 2], -1), ([2, 2], -16),
]  # fmt: skip


def infeasible(freed, kept_error):
    args = problem([(None, 0, 5)], 2, 3, 8, 2, distributions(8)["random"], floor=1)
    args[9] = torch.tensor([freed], dtype=torch.int32)
    args[-1] = 30 - sum(freed) + kept_error
    return args


@pytest.mark.parametrize(("freed", "kept_error"), INFEASIBLE)
def test_infeasible_request_is_refused_on_the_cpu(freed, kept_error):
    """On CUDA num_freed lies on the device, and reading it would wait for the GPU: see the next
    test for what happens there."""
    args = infeasible(freed, kept_error)
    with pytest.raises(RuntimeError):
        reference.select_pages(*args)
    if not ops.backends()["CPU"]["select_pages"]:
        pytest.skip("no native CPU kernels are built")
    with pytest.raises(RuntimeError):
        run("cpu", args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("freed", "kept_error"), INFEASIBLE)
def test_infeasible_request_is_clamped_on_cuda(freed, kept_error):
    """A group frees what it can; keys are written as far as ``num_kept_pages`` allows, and nothing
    behind."""
    if not ops.backends()["CUDA"]["select_pages"]:
        pytest.skip("no native CUDA kernels are built")
    args = infeasible(freed, kept_error)
    possible = list(args)
    possible[9] = args[9].clamp(0, 12)
    possible[-1] = 30 - int(possible[9].sum())
    expected = reference.select_pages(*possible)
    moved = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
    # Small results land in the gaps between these; with an error of -16, what must not be written
    # is longer than what the allocator rounds up.
    guards = [torch.full((512,), 7, dtype=torch.uint8, device="cuda") for _ in range(64)]
    del guards[::2]
    kept_pages, kept_first, kept_keys = ops.select_pages(*moved)
    assert all((guard == 7).all() for guard in guards)
    assert torch.equal(kept_pages.cpu(), expected[0])
    assert torch.equal(kept_first.cpu(), expected[1])
    n = min(args[-1], possible[-1])  # what is behind stays undefined
    assert kept_keys.shape[0] == args[-1]
    assert torch.equal(kept_keys[:n].cpu(), expected[2][:n])


BAD = [
    ("scores", 0, lambda t: t.double()),
    ("scores", 0, lambda t: t.t()),
    ("scores", 0, lambda t: t[:, ::2]),
    ("page_start", 1, lambda t: t.int()),
    ("state_slot", 2, lambda t: t.long()),
    ("num_pages", 3, lambda t: t.flatten()),
    ("first_page", 4, lambda t: t[:1]),
    ("covered", 5, lambda t: t[:1]),
    ("new_covered", 8, lambda t: t.repeat(2)),
    ("num_freed", 9, lambda t: t[0]),
    ("num_freed", 9, lambda t: torch.zeros(1, 4, dtype=torch.int32, device=t.device)),
    ("num_recent", 10, lambda t: t.long()),
    ("num_sinks", 11, lambda n: -1),
    ("floor_pages", 12, lambda n: -1),
    ("num_kept_pages", 13, lambda n: -1),
]


@pytest.mark.parametrize(("name", "index", "change"), BAD)
def test_bad_argument_is_named(device, name, index, change):
    args = problem([(None, 0, 5)], 2, 3, 8, 1, distributions(8)["random"])
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.select_pages(*args)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("page_start", 1, lambda t: t + 2),
        ("page_start", 1, lambda t: t - 2),
        ("state_slot", 2, lambda t: t + 99),
        ("new_covered", 8, lambda t: t + 1),
        ("floor_pages must cover num_sinks and num_recent", 10, lambda t: t + 9),
        ("floor_pages must cover num_sinks and num_recent", 11, lambda n: 9),
    ],
)
def test_bad_value_is_refused_on_the_cpu(name, index, change):
    """CUDA does not look: reading a value would wait for the GPU."""
    if not ops.backends()["CPU"]["select_pages"]:
        pytest.skip("no native CPU kernels are built")
    args = problem([(None, 0, 5)], 2, 3, 8, 1, distributions(8)["random"])
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        run("cpu", args)
