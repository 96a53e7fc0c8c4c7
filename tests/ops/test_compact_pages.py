# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import DTYPES, POISON_ID, Request, assert_same_bits, make_batch, uneven

from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference

LAYERS, HEADS = 2, 2
SLOTS = LAYERS * HEADS


def arguments(requests, new_covered, kept, block_size, head_size, dtype):
    """``kept[r]`` is pages per head after the compression; which keys survive is random."""
    blocks = [sum(counts) // SLOTS for counts in kept]
    batch = make_batch(
        requests, LAYERS, HEADS, block_size, head_size, dtype, spare_blocks=sum(blocks) + 1
    )
    new_blocks = torch.full((len(requests), max([1, *blocks]) + 2), POISON_ID, dtype=torch.int32)
    new_blocks = new_blocks[:, 1:]
    keys = []
    for r, (request, counts) in enumerate(zip(requests, kept, strict=True)):
        for i in range(blocks[r]):
            new_blocks[r, i] = batch.free_blocks.pop()
        for head, count in enumerate(counts):
            packed = request.packed[head] if request.packed is not None else 0
            n = (packed + new_covered[r] - request.covered) * block_size
            keys.append(torch.randperm(n)[: count * block_size].sort().values)
    kept_pages = torch.tensor(kept, dtype=torch.int32).view(len(requests), LAYERS, HEADS)
    flat = kept_pages.flatten()
    kept_first = (flat.cumsum(0) - flat).int().view_as(kept_pages)
    kept_keys = torch.cat(keys).int().view(-1, block_size) if keys else torch.empty(0, block_size)
    return [
        batch.pages, batch.block_table, *batch.state(), kept_pages, kept_first, kept_keys.int(),
        new_blocks, None,
    ]  # fmt: skip


def on(device, args):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def check(device, args):
    expected = args[0].clone()
    reference.compact_pages(expected, *args[1:])
    moved = on(device, args)
    ops.compact_pages(*moved)
    assert_same_bits(moved[0], expected)
    return expected


def hostile(block_size):
    """Requests, F after the compression, and kept pages per head."""
    requests = [
        Request(tail=5 * block_size + 3),
        Request(tail=4 * block_size, packed=uneven(2 * SLOTS, SLOTS), covered=3),
        Request(tail=block_size - 1, packed=[1] * SLOTS, covered=1),
        Request(tail=0, queries=0),
        Request(tail=3 * block_size),
    ]
    kept = [[5, 0, 2, 1], [4, 4, 0, 4], [1, 1, 1, 1], [0, 0, 0, 0], [3, 3, 3, 3]]
    return requests, [5, 7, 1, 0, 3], kept


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_hostile_batch(device, dtype, head_size, block_size):
    args = arguments(*hostile(block_size), block_size, head_size, dtype)
    before = args[0].clone()
    after = check(device, args)
    # Only the new blocks changed, and all of them are filled.
    new = torch.zeros(len(before) // SLOTS, dtype=torch.bool)
    new[args[11][args[11] < POISON_ID].long()] = True
    per_block = after.view(-1, SLOTS, *after.shape[1:])
    assert per_block[new].isfinite().all()
    assert_same_bits(per_block[~new], before.view_as(per_block)[~new])


@pytest.mark.parametrize("numbers", [1, 4])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
def test_scores_move_with_their_keys(device, numbers, block_size):
    """One number per key, and the four of the accumulated statistics, instead of K and V."""
    args = arguments(*hostile(block_size), block_size, 32, torch.float32)
    args[0] = torch.randn(*args[0].shape[:2], numbers)
    check(device, args)


def test_runs_of_neighbours(device):
    """Keys that survive together, across page borders and not: copied in runs."""
    args = arguments([Request(tail=96)], [6], [[2, 2, 2, 2]], 16, 32, torch.float32)
    for head, keys in enumerate(
        [range(32), range(7, 39), [*range(0, 16, 2), *range(40, 64)], [*range(31), 95]]
    ):
        args[10][2 * head : 2 * head + 2] = torch.tensor(list(keys)).view(2, 16)
    check(device, args)


@pytest.mark.parametrize("requests", [[], [Request(0, 0)]])
def test_empty_batches(device, requests):
    kept = [[0] * SLOTS for _ in requests]
    check(device, arguments(requests, [0] * len(requests), kept, 16, 32, torch.float32))


BAD = [
    ("pages", 0, lambda t: t[:, ::2]),
    ("pages", 0, lambda t: t[:-1]),
    ("block_table", 1, lambda t: t.long()),
    ("state_slot", 2, lambda t: t[:0]),
    ("num_pages", 3, lambda t: t.float()),
    ("first_page", 4, lambda t: t[..., :1]),
    ("covered", 5, lambda t: t.long()),
    ("kept_pages", 8, lambda t: t.long()),
    ("kept_pages", 8, lambda t: t[0]),
    ("kept_first", 9, lambda t: t[:, :1]),
    ("kept_keys", 10, lambda t: t.long()),
    ("kept_keys", 10, lambda t: t[:, :8]),
    ("new_blocks", 11, lambda t: t.long()),
    ("new_blocks", 11, lambda t: t.repeat(2, 1)),
]


@pytest.mark.parametrize(("name", "index", "change"), BAD)
def test_bad_argument_is_named(device, name, index, change):
    args = arguments([Request(tail=96)], [6], [[2, 2, 2, 2]], 16, 32, torch.float32)
    args = on(device, args)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.compact_pages(*args)


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("block_table", 1, lambda t: t + POISON_ID),
        ("block_table", 1, lambda t: t[:, :2]),
        ("state_slot", 2, lambda t: t + POISON_ID),
        ("kept_first", 9, lambda t: t + 1),
        ("kept_first", 8, lambda t: t * 2),
        ("kept_keys", 10, lambda t: t - 99),
        ("block_table", 10, lambda t: t + 999),
        ("new_blocks", 11, lambda t: t[:, :1]),
        ("new_blocks", 11, lambda t: t + POISON_ID),
    ],
)
def test_bad_value_is_refused_on_the_cpu(name, index, change):
    """CUDA does not look: reading a value would wait for the GPU."""
    if not ops.backends()["CPU"]["compact_pages"]:
        pytest.skip("no native CPU kernels are built")
    args = arguments([Request(tail=96)], [6], [[2, 2, 2, 2]], 16, 32, torch.float32)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=name):
        ops.compact_pages(*args)
