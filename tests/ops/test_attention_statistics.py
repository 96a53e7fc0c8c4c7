# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import (
    DTYPES,
    Request,
    assert_close,
    assert_same_bits,
    make_batch,
    moved,
    page_starts,
    uneven,
    unsupported,
)

from kvcompress_vllm import ops
from kvcompress_vllm.ops import (
    ATTENTION_CHANNELS,
    ENTROPY,
    LAST,
    LOW_COUNT,
    MAXIMUM,
    MEAN_SQUARES,
    SUM,
    reference,
)

LAYERS, HEADS = 2, 2
SLOTS = LAYERS * HEADS
ALL = ATTENTION_CHANNELS
CHANNELS = ops.CHANNELS[: ALL.bit_count()]


def arguments(requests, num_queries, window, group, head_size, block_size, dtype, device,
              stride=1):  # fmt: skip
    """All full blocks are candidates; pages that no request owns lie between the outputs."""
    batch = make_batch(requests, LAYERS, HEADS, block_size, head_size, dtype)
    places = len(requests) + 2
    # The ring is a slice of a longer one; only the last queries of each request are in it.
    ring = torch.full((LAYERS, places + 1, window, HEADS * group, head_size), float("nan"))
    ring = ring.to(dtype)[:, 1:]
    observe_slot = torch.randperm(places)[: len(requests)].int()
    new_covered = batch.seq_lens // block_size
    starts, end = page_starts(
        sum(request.packed or ()) + (blocks - request.covered) * SLOTS
        for request, blocks in zip(requests, new_covered.tolist(), strict=True)
    )
    for r, (n, slot) in enumerate(zip(num_queries, observe_slot.tolist(), strict=True)):
        seq_len = int(batch.seq_lens[r])
        positions = torch.arange(seq_len - 1 - (n - 1) * stride, seq_len, stride)
        assert positions.numel() == n and (positions >= 0).all()
        shape = (LAYERS, n, HEADS * group, head_size)
        ring[:, slot, positions // stride % window] = (2 * torch.randn(shape)).to(dtype)
    b = batch.to(device)
    tail = (
        observe_slot,
        torch.tensor(num_queries, dtype=torch.int32),
        new_covered.int(),
        starts,
    )
    # Copying drops the gap that the slice left.
    moved = torch.empty(LAYERS, places + 1, *ring.shape[2:], dtype=dtype, device=device)[:, 1:]
    moved.copy_(ring)
    return [moved, b.pages, *b.rows(), *(t.to(device) for t in tail), end, ALL, stride,
            head_size**-0.5]  # fmt: skip


def check(args, what="statistics", **logits):
    expected = reference.attention_statistics(
        *(a.cpu() if isinstance(a, torch.Tensor) else a for a in args), **moved(logits, "cpu")
    )
    if unsupported(args[1]):
        with pytest.raises(RuntimeError, match=unsupported(args[1])):
            ops.attention_statistics(*args)
        return expected
    actual = ops.attention_statistics(*args, **logits).cpu()
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    for channel, name in enumerate(CHANNELS):
        if channel == LOW_COUNT:
            continue
        of_channel = "entropy" if channel == ENTROPY else what
        try:
            assert_close(of_channel, actual[channel], expected[channel])
        except AssertionError as error:
            raise AssertionError(f"channel {name}: {error}") from None
    # A count flips where a probability equals its threshold up to rounding: rarely, and by one.
    apart = (actual[LOW_COUNT] - expected[LOW_COUNT]).abs()
    assert apart.max() <= 1 and (apart > 0).sum() <= 1e-3 * apart.numel()
    return expected


def hostile(block_size):
    return [
        Request(tail=5 * block_size + 3),
        Request(tail=2 * block_size, packed=uneven(2 * SLOTS, SLOTS), covered=3),
        Request(tail=block_size - 1, packed=uneven(SLOTS, SLOTS), covered=1),
        Request(tail=0, queries=0),
        Request(tail=64 + block_size + 1),
        Request(tail=block_size),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_hostile_batch(device, dtype, group, head_size, block_size):
    num_queries = [8, 5, 7, 0, 1, 8]
    args = arguments(
        hostile(block_size), num_queries, 8, group, head_size, block_size, dtype, device
    )
    check(args)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 33])
def test_windows_at_the_edges_of_a_panel(device, window):
    rows = [Request(tail=130), Request(tail=70, packed=uneven(3 * SLOTS, SLOTS), covered=9)]
    for n in {1, window // 2 + 1, window}:
        check(arguments(rows, [n, window], window, 2, 64, 16, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [2, 3, 16, 37])
@pytest.mark.parametrize("window", [4, 9, 40])
def test_sampled_queries(device, dtype, stride, window):
    """Every stride-th query, so each sees fewer keys than one of the last."""
    length = 300
    most = min(window, (length - 1) // stride + 1)
    rows = [Request(tail=length), Request(tail=7 * 16 + 5), Request(tail=length + 1)]
    rows.append(Request(tail=150, packed=uneven(3 * SLOTS, SLOTS), covered=9))
    queries = [most, min(window, 116 // stride + 1), 1, min(window, 149 // stride + 1)]
    check(arguments(rows, queries, window, 2, 64, 16, dtype, device, stride))


def test_a_stride_is_queries_one_by_one(device):
    """The meaning of a stride, without the reference: the sum of windows of one query each."""
    args = arguments([Request(tail=100)], [100], 100, 2, 64, 16, torch.float32, device)
    ring = args[0]
    every = ops.attention_statistics(*args)
    sparse, wanted = list(args), torch.zeros(len(CHANNELS), *every.shape[1:], device=device)
    positions = torch.arange(100 - 1 - 4 * 20, 100, 20)
    for position in positions.tolist():
        one = list(args)
        one[0] = torch.zeros_like(ring)
        one[0][:, :, position % 100] = ring[:, :, position % 100]
        one[3] = torch.full_like(args[3], position + 1)
        one[11] = torch.ones_like(args[11])
        one[12] = torch.full_like(args[12], (position + 1) // 16)
        pages, first = (position + 1) // 16, 1
        one[14] = 2 + pages * SLOTS
        part = ops.attention_statistics(*one)[:, first:-1].unflatten(1, (SLOTS, pages))
        wanted[:, 1:-1].unflatten(1, (SLOTS, 6))[:, :, :pages] += part
    sparse[0] = torch.full_like(ring, float("nan"))
    sparse[0][:, :, positions // 20] = ring[:, :, positions]
    sparse[11] = torch.full_like(args[11], 5)
    sparse[16] = 20
    got = ops.attention_statistics(*sparse)
    for channel in (SUM, MEAN_SQUARES, ENTROPY):
        # The first page of every head is whole for all of them.
        a, b = (t[channel, 1:-1].unflatten(0, (SLOTS, 6))[:, 0] for t in (got, wanted))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [0, 1, 2, 4, 8, 16, 32, 64, 2 | 4 | 16, 1 | 8, 32 | 64, 1 | 64])
def test_only_the_selected_channels(device, mask):
    """Whatever else is asked for, a channel has the same bits."""
    args = arguments(hostile(16), [8, 5, 7, 0, 1, 8], 8, 4, 64, 16, torch.bfloat16, device)
    every = ops.attention_statistics(*args)
    args[15] = mask
    some = ops.attention_statistics(*args)
    assert_same_bits(some, every[[c for c in range(len(CHANNELS)) if mask >> c & 1]])


def test_all_queries_of_a_short_request(device):
    """As many queries as keys: the first query sees one key."""
    check(arguments([Request(tail=17)], [17], 20, 2, 64, 16, torch.float32, device))


def test_queries_older_than_the_keys_count_nowhere(device):
    """Heads without packed pages hold the tail alone, shorter than the window of queries."""
    packed = [0, 4, 0, 0]
    args = arguments([Request(19, packed=packed, covered=2)], [30], 30, 2, 64, 16,
                     torch.float32, device)  # fmt: skip
    assert check(args).isfinite().all()


@pytest.mark.parametrize("block_size", [1, 24, 128])
def test_blocks_that_do_not_divide_a_tile(device, block_size):
    rows = [Request(tail=300), Request(tail=200, packed=uneven(SLOTS, SLOTS), covered=2)]
    check(arguments(rows, [8, 5], 8, 2, 64, block_size, torch.float32, device))


def test_low_count_where_it_is_clear_cut(device):
    """Each query attends to one key alone: all other visible keys are low."""
    args = arguments([Request(tail=32)], [4], 4, 2, 64, 16, torch.float32, device)
    ring, pages = args[0], args[1]
    ring.zero_()
    ring[..., 0] = 100.0
    pages.zero_()
    pages[:, 3, 0] = 100.0  # key 3 of every page
    args[-1] = 1.0
    low = ops.attention_statistics(*args)[LOW_COUNT, 1:-1].cpu()
    expected = torch.full((SLOTS, 2, 16), 4.0)
    expected[:, :, 3] = 0
    # The last three keys are hidden from the queries before them.
    expected[:, 1, 13:] = torch.tensor([3.0, 2.0, 1.0])
    torch.testing.assert_close(low.view(SLOTS, 2, 16), expected, atol=0, rtol=0)


def test_sums_add_up(device):
    """Over all keys of a head the probabilities of every query sum to one."""
    args = arguments([Request(tail=64)], [9], 10, 3, 64, 16, torch.float32, device)
    statistics = ops.attention_statistics(*args)[:, 1:-1].cpu()
    total, squares, heads, _, mean_squares, entropy, last, maximum = statistics
    torch.testing.assert_close(total.view(SLOTS, -1).sum(-1), torch.full((SLOTS,), 27.0))
    assert (squares <= total + 1e-6).all() and (heads >= squares - 1e-6).all()
    assert (9 * mean_squares <= 3 * squares + 1e-6).all()  # the square of a mean, the mean square
    torch.testing.assert_close(last.view(SLOTS, -1).sum(-1), torch.full((SLOTS,), 3.0))
    assert (maximum >= total / 27 - 1e-6).all() and (maximum.square() <= squares + 1e-6).all()
    # The entropy of a distribution over 64 keys.
    by_head = entropy.view(SLOTS, -1).sum(-1) / 27
    assert (by_head >= 0).all() and (by_head <= torch.tensor(64.0).log()).all()


def test_uniform_attention(device):
    """Zero queries look everywhere alike, so every channel is known."""
    args = arguments([Request(tail=64)], [3], 3, 4, 64, 16, torch.float32, device)
    args[0] = torch.zeros_like(args[0])
    got = ops.attention_statistics(*args)[:, 1:-1].unflatten(1, (SLOTS, 4)).flatten(2).cpu()
    sees = torch.tensor([62.0, 63.0, 64.0])
    p = torch.where(torch.arange(64) < sees[:, None], 1 / sees[:, None], 0.0)
    for channel, expected in {
        SUM: 4 * p.sum(0),
        MEAN_SQUARES: p.square().sum(0),
        ENTROPY: -4 * p.xlogy(p).sum(0),
        LAST: 4 * p[-1],
        MAXIMUM: p.amax(0),
    }.items():
        torch.testing.assert_close(got[channel], expected.expand(SLOTS, -1), msg=CHANNELS[channel])


def test_entropy_of_vanishing_probabilities(device):
    """Logits hundreds apart: p underflows to zero, and nothing becomes NaN."""
    args = arguments([Request(tail=40)], [4], 4, 2, 64, 16, torch.float32, device)
    args[0] = args[0] * 300
    statistics = ops.attention_statistics(*args).cpu()
    assert statistics.isfinite().all()
    assert (statistics[SUM] == 0).any() and (statistics[ENTROPY] >= 0).all()
    assert (statistics[ENTROPY] <= 1e-3 + 8 * torch.tensor(40.0).log()).all()


def test_free_memory_does_not_matter(device):
    rows = hostile(16)
    args = arguments(rows, [8, 5, 7, 0, 1, 8], 8, 2, 64, 16, torch.float32, device)
    before = ops.attention_statistics(*args)
    assert before.isfinite().all()
    for value in (0.0, float("inf")):
        args[1] = torch.where(args[1].isnan(), value, args[1])
        assert_same_bits(ops.attention_statistics(*args), before)


@pytest.mark.parametrize("requests", [[], [Request(tail=0, queries=0)]])
def test_empty_batches(device, requests):
    args = arguments(requests, [0] * len(requests), 4, 2, 64, 16, torch.float32, device)
    assert (ops.attention_statistics(*args) == 0).all()


BAD = [
    ("ring", 0, lambda t: t.half()),
    ("ring", 0, lambda t: t[:1]),
    ("ring", 0, lambda t: t[:, :, :, :3]),
    ("ring", 0, lambda t: t[0]),
    ("pages", 1, lambda t: t[:-1]),
    ("block_table", 2, lambda t: t.long()),
    ("seq_lens", 3, lambda t: t.long()),
    ("state_slot", 4, lambda t: t[:0]),
    ("num_pages", 5, lambda t: t.long()),
    ("first_page", 6, lambda t: t[..., :1]),
    ("covered", 7, lambda t: t.long()),
    ("observe_slot", 10, lambda t: t.long()),
    ("num_queries", 11, lambda t: t.repeat(2)),
    ("new_covered", 12, lambda t: t[None]),
    ("page_start", 13, lambda t: t.int()),
    ("num_candidate_pages", 14, lambda n: -1),
    ("channels", 15, lambda n: 1 << len(CHANNELS)),
    ("channels", 15, lambda n: -1),
    ("query_stride", 16, lambda n: 0),
    ("query_stride", 16, lambda n: -1),
]


@pytest.mark.parametrize(("name", "index", "change"), BAD)
def test_bad_argument_is_named(device, name, index, change):
    args = arguments([Request(tail=33)], [4], 4, 2, 64, 16, torch.float32, device)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.attention_statistics(*args)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("observe_slot", 10, lambda t: t + 99),
        ("num_queries", 11, lambda t: t + 99),
        ("new_covered", 12, lambda t: t + 1),
        ("page_start", 13, lambda t: t + 2),
        ("num_candidate_pages", 14, lambda n: n - 2),
        ("query_stride", 16, lambda n: 11),
    ],
)
def test_bad_value_is_refused_on_the_cpu(name, index, change):
    if not ops.backends()["CPU"]["attention_statistics"]:
        pytest.skip("no native CPU kernels are built")
    args = arguments([Request(tail=33)], [4], 4, 2, 64, 16, torch.float32, "cpu")
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.attention_statistics(*args)
