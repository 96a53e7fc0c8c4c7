# SPDX-License-Identifier: Apache-2.0
"""Packed pages that hold codes: every op over hostile batches, and what quantising promises."""

from __future__ import annotations

import pytest
import torch
from cases import (
    POISON_ID,
    Request,
    assert_close,
    assert_same_bits,
    fused_qkv,
    make_batch,
    moved,
    uneven,
)
from cases import page_starts as starts_of
from op_examples import example
from test_registration import example_again

from kvcompress_vllm import ops
from kvcompress_vllm.cache import fitting
from kvcompress_vllm.cache import page_format as formats
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.ops import reference

LAYERS, HEADS = 2, 2
SLOTS = LAYERS * HEADS
FORMATS = pytest.mark.parametrize(
    "page_format", [PageFormat.FP8, PageFormat.INT4], ids=lambda f: f.label
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def on(device, args):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def hostile(block_size, m):
    """Rows of every kind; F in packed pages."""
    return [
        Request(tail=m * block_size + 1, queries=5),
        Request(tail=1, packed=uneven(2 * SLOTS, SLOTS), covered=5),
        Request(tail=0, queries=0),
        Request(tail=m * block_size + 3, queries=block_size + 3, packed=[2] * SLOTS, covered=4),
        Request(tail=2 * m * block_size + 5, queries=1, packed=uneven(5 * SLOTS, SLOTS), covered=7),
        Request(tail=3 * 64 + 7, queries=70),
        Request(tail=m * block_size, queries=1, packed=[1] * SLOTS, covered=1),
    ]


def batch_of(page_format, head_size, dtype, block_size=16, spare=3):
    rows = hostile(block_size, page_format.blocks_per_page)
    return make_batch(rows, LAYERS, HEADS, block_size, head_size, dtype, spare, page_format)


def attend(batch, group, head_size, dtype, device, layer=1, heads=HEADS, **logits):
    """What the op and its reference make of a batch."""
    tokens = int(batch.query_start[-1])
    query, _, _ = fused_qkv(tokens, heads, group, head_size, dtype, "cpu")
    out = torch.full((tokens, heads * group, head_size), 7.0, dtype=dtype)
    args = [query, batch.pages, *batch.rows(), batch.query_start, layer, head_size**-0.5]
    reference.paged_attention(*args, out, **logits)
    found = torch.full_like(out, 7.0, device=device)
    b = batch.to(device)
    args[1:-2] = [b.pages, *b.rows(), b.query_start]
    ops.paged_attention(*on(device, args), found, **moved(logits, device))
    return found, out


@FORMATS
@DTYPES
@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 160, 192, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 16])
def test_attention(device, page_format, dtype, head_size, group):
    batch = batch_of(page_format, head_size, dtype)
    assert_close("attention to codes", *attend(batch, group, head_size, dtype, device))


@pytest.mark.parametrize("head_size", [80, 112])
@DTYPES
def test_attention_with_head_sizes_that_fp8_alone_takes(device, dtype, head_size):
    batch = batch_of(PageFormat.FP8, head_size, dtype)
    assert_close("attention to codes", *attend(batch, 4, head_size, dtype, device))


@FORMATS
@pytest.mark.parametrize("block_size", [8, 32, 64])
def test_attention_with_other_block_sizes(device, page_format, block_size):
    batch = batch_of(page_format, 64, torch.bfloat16, block_size)
    if device == "cuda" and block_size < 16:
        with pytest.raises(RuntimeError, match="16 tokens or more"):
            attend(batch, 2, 64, torch.bfloat16, device)
        return
    assert_close("attention to codes", *attend(batch, 2, 64, torch.bfloat16, device))


@FORMATS
@DTYPES
def test_attention_of_decode_rows(device, page_format, dtype):
    """One token each, long and short heads: stretches end in pages, at their end, in tails."""
    rows = [
        Request(tail=1 + 7 * i, packed=uneven(SLOTS * (1 + 5 * i), SLOTS), covered=6 * i + 2)
        for i in range(9)
    ]
    rows[4] = Request(tail=130)
    batch = make_batch(rows, LAYERS, HEADS, 16, 128, dtype, 3, page_format)
    for layer in range(LAYERS):
        assert_close("attention to codes", *attend(batch, 4, 128, dtype, device, layer))


@FORMATS
def test_attention_reads_nothing_that_nobody_owns(device, page_format):
    found = []
    for value in (0.0, float("inf"), float("nan")):
        torch.manual_seed(3)
        batch = batch_of(page_format, 64, torch.bfloat16).poisoned(value)
        torch.manual_seed(4)
        found.append(attend(batch, 4, 64, torch.bfloat16, device)[0])
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def candidates_of(batch):
    """F after a compression, first output pages, and output pages in all: units of B keys."""
    m, size = batch.page_format.blocks_per_page, batch.pages.shape[1]
    new_covered = batch.seq_lens // size // m * m
    counts = []
    for r, slot in enumerate(batch.state_slot.tolist()):
        packed = int(batch.num_pages[slot].sum()) * m if slot >= 0 else 0
        covered = int(batch.covered[slot]) if slot >= 0 else 0
        counts.append(packed + (int(new_covered[r]) - covered) * SLOTS)
    starts, end = starts_of(counts)
    return new_covered.int(), starts, end


@FORMATS
@DTYPES
@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("block_size", [8, 16])
def test_statistics(device, page_format, dtype, head_size, block_size):
    measure(batch_of(page_format, head_size, dtype, block_size), head_size, dtype, device)


def measure(batch, head_size, dtype, device, **logits):
    """Both statistics of a batch, against the reference."""
    new_covered, starts, end = candidates_of(batch)
    requests, group, window = len(new_covered), 2, 12
    ring = torch.randn(LAYERS, requests, window, HEADS * group, head_size).to(dtype)
    queries = batch.seq_lens.clamp(max=window).int()
    queries[batch.seq_lens == 0] = 0
    slots = torch.randperm(requests).int()

    def run(where, module):
        b = batch.to(where)
        candidates = on(where, [new_covered, starts])
        attention = module.attention_statistics(
            ring.to(where), b.pages, *b.rows(), *on(where, [slots, queries]), *candidates, end,
            ops.ATTENTION_CHANNELS & ~(1 << ops.LOW_COUNT), 1, head_size**-0.5,
            **moved(logits, where),
        )  # fmt: skip
        keys = module.key_statistics(b.pages, *b.rows(), *candidates, end, ops.KEY_CHANNELS)
        return attention, keys

    found, wanted = run(device, ops), run("cpu", reference)
    for channel in range(len(wanted[0])):
        what = "entropy of codes" if channel == ops.ENTROPY - 1 else "statistics of codes"
        assert_close(what, found[0][channel], wanted[0][channel])
    for what, of_keys, expected in zip(
        ("norm", "likeness", "norm"), found[1], wanted[1], strict=True
    ):
        assert_close(what, of_keys, expected)


@FORMATS
@DTYPES
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
def test_echo_scores(device, page_format, dtype, head_size):
    """Sinks are codes, the keys of segments never."""
    score(batch_of(page_format, head_size, dtype), head_size, dtype, device)


def score(batch, head_size, dtype, device, **logits):
    """Echo scores of a batch, against the reference."""
    m, group = batch.page_format.blocks_per_page, 3
    covered = [0 if s < 0 else int(batch.covered[s]) * 16 for s in batch.state_slot.tolist()]
    segments, token = [], 2
    for r in (1, 3, 4, 5):
        end = int(batch.seq_lens[r])
        middle = (covered[r] + end) // 2
        for a, b in ((covered[r], middle), (middle, end)):
            if a < b:
                segments.append([r, a, b, token])
                token += b - a
    query = torch.randn(token + 1, HEADS * group, head_size).to(dtype)
    angles = torch.rand(head_size // 2) * 6
    rotation = torch.stack([angles.cos(), angles.sin()], -1)
    scores = torch.full((len(batch.pages), m * 16), 7.0)
    tail = [torch.tensor(segments, dtype=torch.int32), rotation, 1, 256, 4, False, head_size**-0.5]
    expected = scores.clone()
    reference.echo_scores(query, batch.pages, *batch.rows(), *tail, expected, **logits)
    b, found = batch.to(device), scores.to(device)
    ops.echo_scores(query.to(device), b.pages, *b.rows(), *on(device, tail), found,
                    **moved(logits, device))  # fmt: skip
    assert ((found.cpu() != 7) == (expected != 7)).all()
    assert_close("echo of codes", found, expected)


def selection(batch, fraction=0.5, floor=1):
    """Arguments of select_pages: about ``fraction`` of the candidates stay."""
    m = batch.page_format.blocks_per_page
    new_covered, starts, end = candidates_of(batch)
    scores = torch.rand(end, batch.pages.shape[1])
    freed = []
    for r, slot in enumerate(batch.state_slot.tolist()):
        packed = batch.num_pages[slot].flatten() if slot >= 0 else torch.zeros(SLOTS)
        covered = int(batch.covered[slot]) if slot >= 0 else 0
        per_head = packed + (int(new_covered[r]) - covered) // m
        most = int((per_head - floor).clamp(min=0).sum())
        # Whole blocks stay.
        kept = max(
            -(-int(per_head.sum() * fraction) // SLOTS), -(-(int(per_head.sum()) - most) // SLOTS)
        )
        freed.append(int(per_head.sum()) - kept * SLOTS)
    total = sum(
        int(batch.num_pages[s].sum()) + (int(n) - int(batch.covered[s])) // m * SLOTS
        if s >= 0 else int(n) // m * SLOTS
        for s, n in zip(batch.state_slot.tolist(), new_covered, strict=True)
    )  # fmt: skip
    recent = torch.full((len(freed),), 3, dtype=torch.int32)
    return [scores, starts, *batch.state(), new_covered, torch.tensor(freed).int().view(-1, 1),
            recent, 2, floor, total - sum(freed)]  # fmt: skip


@FORMATS
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_selection(device, page_format, block_size):
    batch = batch_of(page_format, 32, torch.float16, block_size)
    args = selection(batch)
    expected = reference.select_pages(*args)
    found = ops.select_pages(*on(device, args))
    assert expected[2].shape == (args[-1], page_format.keys_per_page(block_size))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.cpu(), b)


def compaction(batch, fraction=0.5):
    """Arguments of fit_scales and compact_pages after a selection, and their new blocks."""
    kept_pages, kept_first, kept_keys = reference.select_pages(*selection(batch, fraction))
    blocks = (kept_pages.flatten(1).sum(1) // SLOTS).tolist()
    new_blocks = torch.full((len(blocks), max(blocks) + 2), POISON_ID, dtype=torch.int32)[:, 1:]
    for r, count in enumerate(blocks):
        new_blocks[r, :count] = torch.tensor([batch.free_blocks.pop() for _ in range(count)])
    before = [batch.pages, batch.block_table, *batch.state(), kept_pages, kept_first, kept_keys]
    return before, new_blocks, blocks


@FORMATS
@DTYPES
@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_compaction(device, page_format, dtype, head_size, block_size):
    """Mixed sources: codes of other scales and 16 bit. Codes and scales are compared bit by bit."""
    if page_format.problem(head_size, dtype):
        pytest.skip("no head size of this format")
    batch = batch_of(page_format, head_size, dtype, block_size, 60)
    before, new_blocks, _ = compaction(batch)
    scales = reference.fit_scales(*before)
    assert_same_bits(
        ops.fit_scales(*on(device, before)).view(torch.int16), scales.view(torch.int16)
    )
    expected = before[0].clone()
    reference.compact_pages(expected, *before[1:], new_blocks, scales)
    assert (expected.view(torch.int16) != before[0].view(torch.int16)).any()
    moved = on(device, [*before, new_blocks, scales])
    ops.compact_pages(*moved)
    assert_same_bits(moved[0], expected)


@FORMATS
@DTYPES
@pytest.mark.parametrize("head_size", [32, 96, 128, 256])
def test_long_heads(device, page_format, dtype, head_size):
    """More keys than are looked at in one go, and more than all of which choose int4's cut."""
    page, size = page_format.keys_per_page(16), 16
    lengths = [page, 512, 512 + page, 2048 - page, 2048, 2048 + page, 4480]
    blocks = 4544 // size
    pages = torch.randn((1 + blocks) * len(lengths), size, 2 * head_size)
    pages *= torch.rand(2 * head_size) * 3  # channels of every width
    pages += torch.randn(2 * head_size) * 4
    pages[torch.randint(len(pages), (9,)), 3] *= 20  # as the keys that attention sinks have
    pages[..., 5], pages[..., 7] = 0.0, 1.25
    table = (torch.randperm(blocks) + 1).int().view(1, -1)
    nothing = torch.zeros(1, 1, len(lengths), dtype=torch.int32)
    kept = torch.tensor(lengths, dtype=torch.int32).div(page, rounding_mode="floor").view(1, 1, -1)
    keys = [torch.randperm(4544)[:length].sort().values for length in lengths]
    first = (kept.view(-1).cumsum(0) - kept.view(-1)).int().view_as(kept)
    scales = page_format.new_scales(1, 1, len(lengths), head_size, torch.device("cpu"))
    args = [pages.to(dtype), table, torch.tensor([-1], dtype=torch.int32), nothing, nothing,
            torch.zeros(1, dtype=torch.int32), scales, int(page_format), kept, first,
            torch.cat(keys).int().view(-1, page)]  # fmt: skip
    expected = reference.fit_scales(*args)
    assert_same_bits(
        ops.fit_scales(*on(device, args)).view(torch.int16), expected.view(torch.int16)
    )
    if page_format is PageFormat.INT4:  # cut, and not all by the same share
        ids = table[0, keys[-1] // size].long() * len(lengths) + len(lengths) - 1
        stored = formats.to_stored(args[0][ids, keys[-1] % size].float(), page_format)
        share = expected[0, 0, -1, 0].float() / ((stored.amax(0) - stored.amin(0)) / 15)
        assert (share < 0.8).any() and share.nan_to_num(1).amax() > share.nan_to_num(1).amin() * 1.2


@DTYPES
@pytest.mark.parametrize("head_size", [32, 96, 128])
def test_long_heads_go_on(device, dtype, head_size):
    """Scales that there are, beside few and many new keys, which lie within and beyond them."""
    page_format, page, size, packed_pages = PageFormat.INT4, 64, 16, 4
    lengths = [page, 512 + page, 2048 - page, 2048, 2048 + page, 4480]
    heads, covered, tail = len(lengths), 5 * page // size, 4544 // size
    pages = torch.randn((1 + packed_pages + tail) * heads, size, 2 * head_size)
    pages *= torch.rand(2 * head_size) * 3
    table = torch.zeros(1, covered + tail, dtype=torch.int32)
    ids = (torch.randperm(packed_pages + tail) + 1).int()
    table[0, :packed_pages], table[0, covered:] = ids[:packed_pages], ids[packed_pages:]
    scales = page_format.new_scales(1, 1, heads, head_size, torch.device("cpu"))
    stored = formats.to_stored(pages.flatten(0, 1).to(dtype).float(), page_format)
    # Channels whose ranges hold nearly nothing up to all of what comes.
    narrow = torch.logspace(-2, 0.2, 2 * head_size)[torch.randperm(2 * head_size)]
    for head in range(heads):
        scales[0, 0, head] = fitting.fit(stored[head::heads][:500] * narrow, page_format)
    scales[..., 5] = 0.0
    own = torch.full((1, 1, heads), packed_pages, dtype=torch.int32)
    first_page = (own.view(-1).cumsum(0) - packed_pages).int().view_as(own)
    kept = own + torch.tensor(lengths, dtype=torch.int32).div(page, rounding_mode="floor")
    first = (kept.view(-1).cumsum(0) - kept.view(-1)).int().view_as(kept)
    held = torch.arange(packed_pages * page)
    keys = [
        torch.cat([held, len(held) + torch.randperm(4544)[:length].sort().values])
        for length in lengths
    ]
    args = [pages.to(dtype), table, torch.tensor([0], dtype=torch.int32), own, first_page,
            torch.tensor([covered], dtype=torch.int32), scales, int(page_format), kept, first,
            torch.cat(keys).int().view(-1, page)]  # fmt: skip
    expected = reference.fit_scales(*args)
    assert_same_bits(
        ops.fit_scales(*on(device, args)).view(torch.int16), expected.view(torch.int16)
    )
    moved = (expected != scales).any(-2)
    assert moved.any() and not moved.all()
    grown = (expected[..., 0, :].float() / scales[..., 0, :].float())[
        moved & (scales[..., 0, :] > 0)
    ]
    assert grown.amax() > 4 and grown.amin() < 2


@FORMATS
@pytest.mark.parametrize("numbers", [1, 4])
def test_stores_move_with_their_keys(device, page_format, numbers):
    batch = batch_of(page_format, 32, torch.float16, spare=60)
    before, new_blocks, _ = compaction(batch)
    store = torch.randn(len(batch.pages), page_format.keys_per_page(16), numbers)
    expected = store.clone()
    reference.compact_pages(expected, *before[1:], new_blocks, None)
    moved = on(device, [store, *before[1:], new_blocks])
    ops.compact_pages(*moved, None)
    assert_same_bits(moved[0], expected)


def rounds(page_format, dtype, device, count, spread):
    """Compresses a growing request again and again, always keeping its first keys; yields after
    each round what their codes stand for, ``[keys, 2 * D]`` of head 0, and the scales.

    Args:
        spread: of the new keys, by round.
    """
    m, size, head_size = page_format.blocks_per_page, 16, 64
    page = m * size
    pages = torch.zeros(12, size, 2 * head_size, dtype=dtype, device=device)
    codes = formats.packed_codes(pages, page_format)
    tables = [torch.zeros(1, 1, 1, dtype=torch.int32, device=device) for _ in range(2)]
    covered = torch.zeros(1, dtype=torch.int32, device=device)
    scales = page_format.new_scales(1, 1, 1, head_size, torch.device(device))
    slot, packed = -1, 0
    fresh_blocks = torch.arange(4, 4 + m)
    for i in range(count):
        new = (torch.randn(page, 2 * head_size) * spread(i)).to(dtype).to(device)
        pages[fresh_blocks.to(device)] = new.view(m, size, -1)
        old, target = (0, 2) if i % 2 else (2, 0)
        row = torch.tensor([[old, old + 1, *([0] * 100)]], dtype=torch.int32, device=device)
        row[0, i * m : (i + 1) * m] = fresh_blocks.int().to(device)
        if packed:
            row[0, :2] = torch.tensor([old, old + 1])
        # The first page stays as it is; of the second, or of the new keys, some.
        candidates = packed * page + page
        keys = torch.cat([torch.arange(page), torch.arange(page, candidates)[-page:]])
        keys = keys[: min(2, candidates // page) * page].int().view(-1, page).to(device)
        kept = torch.full((1, 1, 1), len(keys), dtype=torch.int32, device=device)
        state = [torch.tensor([slot], dtype=torch.int32, device=device), *tables, covered, scales,
                 page_format]  # fmt: skip
        before = [pages, row, *state, kept, torch.zeros_like(kept), keys]
        new_scales = ops.fit_scales(*before)
        blocks = torch.tensor([[target, target + 1]], dtype=torch.int32, device=device)
        ops.compact_pages(*before, blocks, new_scales)
        slot, packed = 0, len(keys)
        tables[0].fill_(packed)
        covered.fill_((i + 1) * m)
        scales.copy_(new_scales)
        yield formats.decode(codes[target].cpu(), scales[0, 0, 0].cpu(), page_format), scales


@FORMATS
@DTYPES
def test_compressing_again_does_not_drift(device, page_format, dtype):
    """Twenty rounds whose new keys exceed the range again and again."""
    first = None
    for values, scales in rounds(page_format, dtype, device, 20, lambda i: 1.12**i):
        first = values if first is None else first
        step = scales[0, 0, 0, 0].float().cpu()
        moved = values - first
        if page_format is PageFormat.FP8:
            # Steps of e4m3 grow with the number; doubled scales lose what becomes subnormal.
            assert (moved.abs() <= step.repeat_interleave(64) * 2.0**-9).all()
        else:
            # Each time that codes move costs a twelfth, and they grow in between.
            assert (moved / step).square().mean() < 0.3


@DTYPES
def test_a_key_in_many_moves_no_others(device, dtype):
    """Of twenty rounds of the same kind, each has some key farther out than any before."""
    history = list(rounds(PageFormat.INT4, dtype, device, 20, lambda i: 1.0))
    step = history[0][1][0, 0, 0, 0].float().cpu()
    moved = (history[-1][0] - history[0][0]) / step
    assert moved.square().mean() < 0.25  # one pass over all: two twelfths


@DTYPES
@pytest.mark.parametrize("farthest", [1.0, 30.0, 1000.0])
def test_a_key_far_from_all_others_is_reached(device, dtype, farthest):
    """However many there are, none is left out by more than 64 steps; of a head whose first keys
    were all alike, too."""
    for first in (0.0, 1.0):
        *_, (values, scales) = rounds(
            PageFormat.INT4, dtype, device, 3, lambda i, first=first: farthest if i else first
        )
        scale, zero = scales[0, 0, 0].float().cpu()
        reach = torch.maximum(zero + 7 * scale, -(zero - 8 * scale))
        assert (reach + 64 * scale > farthest / 16).all()
        assert values.isfinite().all()


@FORMATS
@DTYPES
def test_scales_stay_while_new_keys_fit(device, page_format, dtype):
    """And then kept keys keep their bits."""
    history = list(rounds(page_format, dtype, device, 6, lambda i: 0.3 if i else 1.0))
    for values, _ in history[1:]:
        assert torch.equal(values, history[0][0])


@FORMATS
@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(device, op, page_format):
    torch.library.opcheck(
        getattr(torch.ops.kvcompress_vllm, op).default,
        tuple(example(op, device, page_format=page_format)),
        test_utils=("test_schema", "test_faketensor"),
    )


READERS = ("paged_attention", "attention_statistics", "key_statistics", "echo_scores",
           "select_pages", "fit_scales", "compact_pages")  # fmt: skip


@pytest.mark.parametrize("op", READERS)
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("page_format", lambda scales, page_format: (scales, 3)),
        ("page_scales", lambda scales, page_format: (None, page_format)),
        ("page_scales", lambda scales, page_format: (scales.float(), page_format)),
        ("page_scales", lambda scales, page_format: (scales[:-1].contiguous(), page_format)),
        ("page_scales", lambda scales, page_format: (scales, 1)),
        ("page_scales", lambda scales, page_format: (scales.mT, page_format)),
    ],
)
def test_bad_scales_are_named(device, op, name, change):
    args = example_again(example(op, device, page_format=PageFormat.INT4))
    index = next(i for i, a in enumerate(args) if getattr(a, "ndim", 0) == 5 and a.shape[3] == 2)
    args[index : index + 2] = change(*args[index : index + 2])
    with pytest.raises(RuntimeError, match=name):
        getattr(ops, op)(*args)


@pytest.mark.parametrize(("head_size", "page_format"), [(80, 2), (48, 2), (8, 1), (40, 1)])
def test_head_sizes_that_no_code_fits_are_refused(device, head_size, page_format):
    batch = batch_of(PageFormat.AUTO, head_size, torch.bfloat16).to(device)
    scales = torch.zeros(*batch.num_pages.shape, 1, 2, dtype=torch.bfloat16, device=device)
    if page_format == 2:
        scales = scales.new_zeros(*batch.num_pages.shape, 2, 2 * head_size)
    rows = [*batch.rows()[:-2], scales, page_format]
    query = torch.zeros(1, HEADS, head_size, dtype=torch.bfloat16, device=device)
    with pytest.raises(RuntimeError, match="head size"):
        ops.paged_attention(query, batch.pages, *rows, batch.query_start, 0, 1.0, query)


def test_fp32_caches_are_refused(device):
    args = example_again(example("fit_scales", device))
    args[0] = args[0].float()
    with pytest.raises(RuntimeError, match="float16 or bfloat16"):
        ops.fit_scales(*args)


@FORMATS
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
def test_every_channel_has_its_place(page_format, head_size):
    """Of a key, and as the matrix instruction's lanes take them."""
    order = formats.order(head_size, page_format)
    assert order.sort().values.equal(torch.arange(2 * head_size))
    per_word = 4 * page_format.blocks_per_page // 2
    for c in range(4):
        words = order[:head_size].view(4, -1, per_word)[c]
        first, second = words[:, : per_word // 2].flatten(), words[:, per_word // 2 :].flatten()
        assert first.equal(torch.arange(head_size // 8) * 8 + 2 * c) and second.equal(first + 1)


@FORMATS
def test_numbers_at_the_ends(page_format):
    """Constant channels, zeros, huge and tiny numbers come back as near as a step allows."""
    values = torch.zeros(64, 128)
    values[:, 1] = 3.0
    values[:, 2] = -7.0
    values[:, 3] = torch.linspace(-1, 1, 64)
    values[:, 70] = torch.linspace(-6e4, 6e4, 64)
    values[:, 71] = 1e-30
    values[:, 72] = torch.linspace(400, 401, 64)
    scales = fitting.fit(values, page_format)
    found = formats.decode(formats.quantise(values, scales, page_format), scales, page_format)
    error = (found - values).abs()
    if page_format is PageFormat.INT4:
        assert (error <= scales[0].float() / 2 * 1.0001 + values.abs() * 1e-6).all()
        assert found[:, 1:3].equal(values[:, 1:3])
        # One far from all others stays far, or costs the others their steps: whichever is less.
        lone = torch.randn(64, 64)
        lone[0, :32] = 40.0
        fitted = fitting.fit(lone, page_format)
        back = formats.decode(formats.quantise(lone, fitted, page_format), fitted, page_format)
        assert (back[0, :32] > 20).all()
        assert (back - lone)[1:].square().mean() < (40 / 15) ** 2 / 12
    else:
        half = torch.maximum(values.abs() / 16, scales[0].float().repeat_interleave(64) * 2.0**-10)
        assert (error <= half * 1.0001).all()


@FORMATS
@pytest.mark.parametrize("head_size", [32, 64, 96, 128, 160, 192, 256])
def test_what_codes_stand_for_can_be_turned_back(page_format, head_size):
    """Blocks of channels by a Hadamard matrix, K and V apart; fp8 leaves them."""
    values = torch.randn(9, 2 * head_size, dtype=torch.float64)
    stored = formats.to_stored(values, page_format)
    torch.testing.assert_close(formats.from_stored(stored, page_format), values)
    if page_format is PageFormat.FP8:
        assert stored.equal(values)
        return
    block = next(p for p in (256, 128, 64, 32) if head_size % p == 0)
    row = torch.arange(block)
    common = row[:, None] & row
    parity = sum(common >> i & 1 for i in range(8)) % 2
    turn = torch.block_diag(*[1.0 - 2 * parity] * (2 * head_size // block)).double()
    torch.testing.assert_close(stored, values @ turn / block)


@pytest.mark.gpu
@pytest.mark.parametrize("page_format", PageFormat, ids=lambda f: f.label)
@pytest.mark.parametrize("head_size", [64, 128])
def test_prefill_in_blocks_of_many_rows(page_format, head_size):
    """So many tokens and heads that a warp takes two tiles of rows: no other batch has them."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    heads, group, m = 16, 16, page_format.blocks_per_page
    rows = [
        Request(
            tail=333, queries=300, packed=uneven(7 * LAYERS * heads, LAYERS * heads), covered=9
        ),
        Request(tail=190, queries=170),
        Request(tail=101, queries=90, packed=[3] * LAYERS * heads, covered=3 * m),
    ]
    # As many blocks of 128 rows as two for each of 160 processors, more than any that we know.
    assert sum(row.queries for row in rows) // (128 // group) * heads >= 2 * 160
    batch = make_batch(rows, LAYERS, heads, 16, head_size, torch.bfloat16, 3, page_format)
    assert_close("attention", *attend(batch, group, head_size, torch.bfloat16, "cuda", heads=heads))


@pytest.mark.gpu
@FORMATS
def test_captured_decode_step(page_format):
    """A graph serves whatever the tables say when it is replayed."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = [
        Request(tail=2 + 5 * i, packed=uneven(SLOTS * (1 + 3 * i), SLOTS), covered=4 * i + 2)
        for i in range(5)
    ]
    batch = make_batch(rows, LAYERS, HEADS, 16, 128, torch.bfloat16, 3, page_format).to("cuda")
    query = torch.randn(len(rows), HEADS * 4, 128, device="cuda").bfloat16()
    out, again = torch.zeros_like(query), torch.zeros_like(query)

    def step(target):
        ops.paged_attention(
            query, batch.pages, *batch.rows(), batch.query_start, 1, 128**-0.5, target
        )

    step(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(out)
    for change in (
        lambda: query.normal_(),
        lambda: batch.page_scales.mul_(2),
        lambda: batch.seq_lens.sub_(1),
    ):
        change()
        graph.replay()
        step(again)
        assert_same_bits(out, again)
