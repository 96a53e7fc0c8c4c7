# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import (
    CUDA_HEAD_SIZES,
    DTYPES,
    Request,
    assert_close,
    assert_same_bits,
    make_batch,
    page_starts,
    uneven,
    unsupported,
)

from kvcompress_vllm import ops
from kvcompress_vllm.ops import KEY_CHANNELS, reference

LAYERS, HEADS = 2, 2
CHANNELS = ops.NORM, ops.LIKENESS, ops.VALUE_NORM
SLOTS = LAYERS * HEADS


def arguments(requests, head_size, block_size, dtype, device, offset=0.0):
    """All full blocks are candidates; pages that no request owns lie between the outputs.

    Args:
        offset: of every number of a key, which makes keys alike.
    """
    batch = make_batch(requests, LAYERS, HEADS, block_size, head_size, dtype)
    batch.pages[..., :head_size] += offset
    new_covered = batch.seq_lens // block_size
    starts, end = page_starts(
        sum(request.packed or ()) + (blocks - request.covered) * SLOTS
        for request, blocks in zip(requests, new_covered.tolist(), strict=True)
    )
    b = batch.to(device)
    return [b.pages, *b.rows(), new_covered.int().to(device), starts.to(device), end, KEY_CHANNELS]


def check(args):
    expected = reference.key_statistics(
        *(a.cpu() if isinstance(a, torch.Tensor) else a for a in args)
    )
    if unsupported(args[0]):
        with pytest.raises(RuntimeError, match=unsupported(args[0])):
            ops.key_statistics(*args)
        return expected
    actual = ops.key_statistics(*args)
    assert_close("norm", actual[0], expected[0])
    assert_close("likeness", actual[1], expected[1])
    assert_close("norm", actual[2], expected[2])
    return actual.cpu()


def hostile(block_size):
    """Packed and not, uneven with empty heads, no tail, less than a block, nothing at all."""
    return [
        Request(tail=5 * block_size + 3),
        Request(tail=2 * block_size, packed=uneven(2 * SLOTS, SLOTS), covered=3),
        Request(tail=block_size - 1, packed=uneven(SLOTS, SLOTS), covered=1),
        Request(tail=0, queries=0),
        Request(tail=0, packed=uneven(3 * SLOTS, SLOTS), covered=5),
        Request(tail=64 + block_size + 1),
        Request(tail=block_size),
        Request(tail=block_size - 1),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [8, 24, *CUDA_HEAD_SIZES])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_hostile_batch(device, dtype, head_size, block_size):
    check(arguments(hostile(block_size), head_size, block_size, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 127, 129, 515, 2051])
def test_lengths_at_the_edges_of_a_tile(device, dtype, length):
    """Heads of one split and of several, in one batch with a long one that decides how many."""
    rows = [Request(tail=length), Request(tail=length + 1500)]
    rows.append(Request(tail=length, packed=uneven(9 * SLOTS, SLOTS), covered=11))
    check(arguments(rows, 128, 16, dtype, device, offset=0.25))


@pytest.mark.parametrize("block_size", [1, 24, 64, 128])
def test_blocks_that_do_not_divide_a_tile(device, block_size):
    rows = [Request(tail=300), Request(tail=200, packed=uneven(SLOTS, SLOTS), covered=2)]
    check(arguments(rows, 64, block_size, torch.float32, device))


def test_against_the_papers_formula(device):
    """In fp64, key by key, on a request that was never packed: no reference of ours."""
    args = arguments([Request(tail=100)], 64, 16, torch.float32, device, offset=0.5)
    got = ops.key_statistics(*args)[:, 1:-1].cpu().view(3, SLOTS, 96)
    row = args[1][0].cpu()
    blocks = row[: -(-100 // 16)].long()
    kv = args[0].cpu().view(-1, SLOTS, 16, 128)[blocks].transpose(0, 1).flatten(1, 2)
    keys, values = kv[:, :100].double().split(64, -1)
    lengths = [[sum(x * x for x in v) ** 0.5 for v in head[:96].tolist()] for head in values]
    torch.testing.assert_close(got[2].double(), torch.tensor(lengths).double(), atol=0, rtol=1e-6)
    for head, of_head in enumerate(keys):
        mean = sum(key / key.norm() for key in of_head) / len(of_head)
        wanted = torch.tensor([key @ mean / (key.norm() * mean.norm()) for key in of_head[:96]])
        torch.testing.assert_close(got[0, head].double(), of_head[:96].norm(dim=-1), atol=0,
                                   rtol=1e-6)  # fmt: skip
        torch.testing.assert_close(got[1, head].double(), wanted.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_keys_of_one_direction(device, dtype):
    """More than fp16 counts, and with squares beyond what fp16 holds."""
    args = arguments([Request(tail=70_000)], 32, 32, dtype, device)
    args[0][..., [0, 32]] += 300
    statistics = check(args)
    assert (statistics[[0, 2], 1:-1] > 250).all() and (statistics[1, 1:-1] > 0.99).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_without_length(device, dtype):
    """Whole heads of them, single ones, and numbers whose squares vanish in 16 bits."""
    args = arguments(hostile(16), 64, 16, dtype, device)
    pages = args[0]
    pages[::2, 3, :64] = 0
    tiny = torch.finfo(dtype).tiny if dtype == torch.float16 else 1e-15
    pages[:, 5, :64] = (tiny * torch.randn(64)).to(dtype).to(device)
    statistics = check(args)
    assert (statistics[0] == 0).any() and (statistics[1, statistics[0] == 0] == 0).all()
    pages[..., :64] = 0
    without = ops.key_statistics(*args)
    assert (without[:2] == 0).all() and without[2].cpu().equal(statistics[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_without_length(device, dtype):
    args = arguments(hostile(16), 64, 16, dtype, device)
    args[0][::2, 3, 64:] = 0
    args[0][:, 5, 64:] = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1e-15
    args[0][:, 6, 64:] = torch.finfo(torch.float16).max
    statistics = check(args)
    assert (statistics[2, :, 3] == 0).any() and (statistics[2, :, 5] < 1e-3).all()
    assert statistics.isfinite().all() and (statistics[2, :, 6] > 8 * 65_000).any()


def test_directions_that_cancel(device):
    """The mean of opposite keys is zero, and nothing is like it."""
    args = arguments([Request(tail=32)], 32, 16, torch.float32, device)
    args[0][..., :32] = 0
    args[0][:, ::2, 7], args[0][:, 1::2, 7] = 2.0, -2.0
    statistics = check(args)
    assert (statistics[0, 1:-1] == 2).all() and (statistics[1] == 0).all()


@pytest.mark.parametrize("mask", [part << ops.NORM for part in range(7)])
def test_only_the_selected_channels(device, mask):
    """Whatever else is asked for, a channel has the same bits."""
    args = arguments(hostile(16), 80, 16, torch.bfloat16, device)
    every = ops.key_statistics(*args)
    args[-1] = mask
    some = ops.key_statistics(*args)
    assert_same_bits(some, every[[i for i, c in enumerate(CHANNELS) if mask >> c & 1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of_values", [False, True])
def test_the_other_half_and_free_memory_do_not_matter(device, dtype, of_values):
    """Norms of values see no key, and what is known of keys no value."""
    args = arguments(hostile(16), 64, 16, dtype, device)
    args[-1] = 1 << ops.VALUE_NORM if of_values else KEY_CHANNELS & ~(1 << ops.VALUE_NORM)
    before = ops.key_statistics(*args)
    assert before.isfinite().all() and before.any()
    free = args[0].isnan()
    for value in (0.0, float("inf"), float("nan")):
        args[0][free] = value
        args[0][..., slice(64) if of_values else slice(64, None)] = value
        assert_same_bits(ops.key_statistics(*args), before)


def test_the_same_bits_twice(device):
    args = arguments([Request(tail=3000), *hostile(16)], 128, 16, torch.bfloat16, device)
    assert_same_bits(ops.key_statistics(*args), ops.key_statistics(*args))


@pytest.mark.parametrize("requests", [[], [Request(tail=0, queries=0)]])
def test_empty_batches(device, requests):
    args = arguments(requests, 64, 16, torch.float32, device)
    assert (ops.key_statistics(*args) == 0).all()


BAD = [
    ("pages", 0, lambda t: t[:-1]),
    ("pages", 0, lambda t: t.double()),
    ("pages", 0, lambda t: t[..., :-1].contiguous()),
    ("pages", 0, lambda t: t[..., ::2]),
    ("block_table", 1, lambda t: t.long()),
    ("seq_lens", 2, lambda t: t.long()),
    ("state_slot", 3, lambda t: t[:0]),
    ("num_pages", 4, lambda t: t.long()),
    ("first_page", 5, lambda t: t[..., :1]),
    ("covered", 6, lambda t: t.long()),
    ("new_covered", 9, lambda t: t[None]),
    ("page_start", 10, lambda t: t.int()),
    ("num_candidate_pages", 11, lambda n: -1),
    ("channels", 12, lambda n: n | 1),
    ("channels", 12, lambda n: n << 1),
    ("channels", 12, lambda n: -1),
]


@pytest.mark.parametrize(("name", "index", "change"), BAD)
def test_bad_argument_is_named(device, name, index, change):
    args = arguments([Request(tail=33)], 64, 16, torch.float32, device)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.key_statistics(*args)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("block_table", 1, lambda t: t + 99),
        ("seq_lens", 2, lambda t: t + 99),
        ("state_slot", 3, lambda t: t + 99),
        ("new_covered", 9, lambda t: t + 1),
        ("page_start", 10, lambda t: t + 2),
        ("page_start", 10, lambda t: t - 2),
        ("num_candidate_pages", 11, lambda n: n - 2),
    ],
)
def test_bad_value_is_refused_on_the_cpu(name, index, change):
    if not ops.backends()["CPU"]["key_statistics"]:
        pytest.skip("no native CPU kernels are built")
    args = arguments([Request(tail=33)], 64, 16, torch.float32, "cpu")
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.key_statistics(*args)
