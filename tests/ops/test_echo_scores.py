# SPDX-License-Identifier: Apache-2.0
from itertools import pairwise

import pytest
import torch
from cases import (
    CUDA_HEAD_SIZES,
    DTYPES,
    POISON_ID,
    Request,
    assert_close,
    assert_same_bits,
    fused_qkv,
    make_batch,
    moved,
    uneven,
)

from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference

LAYERS, HEADS, LAYER = 2, 2, 1
SLOTS = LAYERS * HEADS
SEGMENT = 64
QUERY, PAGES, TABLE, SEQ_LENS, STATE_SLOT, SEGMENTS, ROTATION = 0, 1, 2, 3, 4, 10, 11
MAX_SEGMENT, NUM_SINKS, SCORES = 13, 14, 17


def angles(pairs, delta=256.0):
    """Cosine and sine of ``delta`` steps of a rotary embedding, ``[pairs, 2]``."""
    angle = delta * 10000.0 ** (-torch.arange(pairs) / max(1, pairs))
    return torch.stack([angle.cos(), angle.sin()], dim=-1)


def cut(begin, end, segment):
    """[begin, end), cut at the multiples of ``segment``."""
    edges = [begin, *range((begin // segment + 1) * segment, end, segment), end]
    return list(pairwise(edges))


def segments_of(batch, segment=SEGMENT):
    """Of all rows with several new tokens; ``[S, 4]``."""
    starts, lengths = batch.query_start.tolist(), batch.seq_lens.tolist()
    found = []
    for row, (begin, end, n) in enumerate(zip(starts, starts[1:], lengths, strict=False)):
        if end - begin > 1:
            first = n - (end - begin)
            found += [[row, a, b, begin + a - first] for a, b in cut(first, n, segment)]
    return torch.tensor(found, dtype=torch.int32).view(-1, 4)


def arguments(
    batch,
    group,
    head_size,
    dtype,
    device,
    *,
    segments=None,
    pairs=None,
    interleaved=False,
    num_sinks=4,
    scale=None,
    max_segment=256,
):
    """Arguments on ``device``; the scores are sevens."""
    heads = batch.num_pages.shape[2]
    query, _, _ = fused_qkv(int(batch.query_start[-1]), heads, group, head_size, dtype, device)
    segments = segments_of(batch) if segments is None else segments
    scores = torch.full(batch.pages.shape[:2], 7.0, device=device)
    b = batch.to(device)
    return [query, b.pages, *b.rows(), segments.to(device),
            angles(head_size // 2 if pairs is None else pairs).to(device), LAYER, max_segment,
            num_sinks, interleaved, head_size**-0.5 if scale is None else scale,
            scores]  # fmt: skip


def on_cpu(args):
    copy = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    return [*copy[:-1], copy[-1].clone()]


def check(args, what="echo", **logits):
    """Against the reference; returns how many keys have a score."""
    expected = on_cpu(args)
    reference.echo_scores(*expected, **moved(logits, "cpu"))
    ops.echo_scores(*args, **logits)
    assert_close(what, args[-1], expected[-1])
    written = expected[-1] != 7
    lengths = expected[SEGMENTS][:, 2] - expected[SEGMENTS][:, 1]
    assert written.sum() == lengths.sum() * args[5].shape[2]
    assert ((args[-1].cpu() != 7) == written).all()
    assert args[-1].isfinite().all()
    return int(written.sum())


def check_or_refused(args, limit):
    """``limit``: what CUDA says it cannot do with these arguments; None: nothing."""
    if limit is None or args[0].device.type != "cuda":
        check(args)
        return
    with pytest.raises(RuntimeError, match=limit):
        ops.echo_scores(*args)


def hostile(block_size):
    """Whole segments and parts of them, at and off the edges of blocks, after prefixes, sinks in
    packed and in unpacked pages; and rows that nobody scores."""
    return [
        Request(tail=3 * SEGMENT + 5, queries=3 * SEGMENT + 5),
        Request(tail=1),
        Request(tail=0, queries=0),
        Request(tail=2 * SEGMENT + 1, queries=SEGMENT + 1),
        Request(tail=SEGMENT + 2 * block_size + 3, queries=5),
        Request(tail=2, queries=2),
        Request(tail=SEGMENT, packed=uneven(2 * SLOTS, SLOTS), covered=3),
        Request(tail=150, queries=130, packed=uneven(SLOTS, SLOTS), covered=64 // block_size),
        Request(tail=150, queries=150, packed=[2] * SLOTS, covered=1 + 128 // block_size),
        Request(tail=0, queries=0),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_hostile_batch(device, dtype, group, head_size, block_size):
    batch = make_batch(hostile(block_size), LAYERS, HEADS, block_size, head_size, dtype)
    check(arguments(batch, group, head_size, dtype, device))


@pytest.mark.parametrize("head_size", [8, 40, 96, 112, 160, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [3, 16])
def test_other_head_sizes(device, head_size, dtype, group):
    batch = make_batch([Request(150, 100)], LAYERS, HEADS, 16, head_size, dtype)
    limit = None if head_size in CUDA_HEAD_SIZES else f"head size must be .* not {head_size}"
    check_or_refused(arguments(batch, group, head_size, dtype, device), limit)


@pytest.mark.parametrize("length", [1, 2, 7, 15, 16, 17, 31, 63, 64, 65, 127, 200, 255, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 3, 40])
def test_segment_lengths_at_edges(device, length, dtype, prefix):
    """One segment of any length, at the start (sinks inside it), within a block and beyond one."""
    n = prefix + length
    batch = make_batch([Request(n, length)], LAYERS, HEADS, 16, 64, dtype)
    segments = torch.tensor([[0, prefix, n, 0]], dtype=torch.int32)
    check(arguments(batch, 3, 64, dtype, device, segments=segments))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [0, 1, 7, 12, 16, 31, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_partial_rotations(device, interleaved, pairs, dtype):
    batch = make_batch([Request(100, 100)], LAYERS, HEADS, 16, 64, dtype)
    check(arguments(batch, 2, 64, dtype, device, pairs=pairs, interleaved=interleaved))


@pytest.mark.parametrize("num_sinks", [0, 1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks(device, num_sinks, dtype):
    """More of them than the segment has keys, too."""
    rows = [*hostile(16), Request(tail=5, queries=5)]
    batch = make_batch(rows, LAYERS, HEADS, 16, 32, dtype)
    check(arguments(batch, 2, 32, dtype, device, num_sinks=num_sinks))


@pytest.mark.parametrize("block_size", [1, 24, 128])
def test_other_block_sizes(device, block_size):
    batch = make_batch([Request(300, 200)], LAYERS, HEADS, block_size, 32, torch.float32)
    limit = None if block_size == 128 else f"pages .*{block_size}.* power of two"
    check_or_refused(arguments(batch, 2, 32, torch.float32, device), limit)


@pytest.mark.parametrize("what", ["max_segment", "num_sinks", "query"])
def test_limits_on_cuda(device, what):
    """The CPU has none of them."""
    batch = make_batch([Request(700, 600)], LAYERS, HEADS, 16, 32, torch.float32)
    group = 17 if what == "query" else 1
    args = arguments(batch, group, 32, torch.float32, device,
                     segments=segments_of(batch, 300 if what == "max_segment" else 64),
                     max_segment=300 if what == "max_segment" else 64,
                     num_sinks=100 if what == "num_sinks" else 4)  # fmt: skip
    check_or_refused(args, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 20.0, -1.0])
def test_flat_peaked_and_negative_logits(device, scale, dtype):
    """Logits from none to +-500: nothing overflows."""
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 32, dtype)
    check(arguments(batch, 2, 32, dtype, device, scale=scale), "peaked echo")


@pytest.mark.parametrize("segments", [0, 1, 300])
def test_many_short_segments_and_none(device, segments):
    n = max(2, 3 * segments)
    batch = make_batch([Request(n, n)], LAYERS, HEADS, 16, 32, torch.bfloat16)
    chosen = torch.tensor(
        [[0, 3 * i, 3 * i + 1 + i % 3, 3 * i] for i in range(segments)], dtype=torch.int32
    ).view(-1, 4)
    chosen = chosen.clamp_max(n)
    args = arguments(batch, 4, 32, torch.bfloat16, device, segments=chosen)
    assert check(args) == HEADS * sum(1 + i % 3 for i in range(segments))


def test_queries_that_cannot_be_loaded_in_words(device):
    """Strides and a start that are multiples of nothing."""
    batch = make_batch([Request(150, 100)], LAYERS, HEADS, 16, 64, torch.bfloat16)
    args = arguments(batch, 2, 64, torch.bfloat16, device)
    wide = torch.full((args[0].shape[0], 4, 67), float("nan"), dtype=torch.bfloat16, device=device)
    odd = torch.cat([wide.flatten(), wide.flatten()[:1]])[1:].view_as(wide)[..., 1:65]
    odd.copy_(args[0])
    args[0] = odd
    check(args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_of_others_does_not_matter(device, dtype):
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 64, dtype)
    args = arguments(batch, 2, 64, dtype, device)
    ops.echo_scores(*args)
    for value in (0.0, 1.0, float("inf")):
        other = [*args[:-1], torch.full_like(args[-1], 7.0)]
        other[PAGES] = batch.poisoned(value).pages.to(device)
        ops.echo_scores(*other)
        assert_same_bits(other[-1], args[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_for_any_chunks(device, dtype):
    """A prompt in chunks that end with segments, beside others or alone, as in one piece."""
    n, other = 5 * SEGMENT + 9, 77
    whole = make_batch([Request(n, n), Request(other, other)], LAYERS, HEADS, 16, 64, dtype)
    args = arguments(whole, 4, 64, dtype, device)
    ops.echo_scores(*args)
    scores = torch.full_like(args[-1], 7.0)
    first = 0
    for end in (SEGMENT, 4 * SEGMENT, n):
        segments = torch.tensor(
            [[0, a, b, a - first] for a, b in cut(first, end, SEGMENT)], dtype=torch.int32
        )
        chunk = list(args)
        chunk[QUERY] = args[QUERY][first:end]
        chunk[SEQ_LENS] = torch.tensor([end, 0], dtype=torch.int32, device=device)
        chunk[SEGMENTS], chunk[SCORES] = segments.to(device), scores
        ops.echo_scores(*chunk)
        first = end
    last = list(args)
    last[SEGMENTS] = args[SEGMENTS][args[SEGMENTS][:, 0] == 1]
    last[SCORES] = scores
    ops.echo_scores(*last)
    assert_same_bits(scores, args[-1])


@pytest.mark.parametrize("where", ["query", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_visible(device, where, dtype):
    """Garbage from the model must not come out as a finite score, nor reach another segment."""
    batch = make_batch([Request(100, 100)], LAYERS, HEADS, 16, 32, dtype)
    args = arguments(batch, 2, 32, dtype, device)
    if where == "query":
        args[QUERY][70, 1, 5] = float("nan")
    else:
        page = int(args[TABLE][0, 70 // 16]) * SLOTS + LAYER * HEADS
        args[PAGES][page, 70 % 16, 5] = float("nan")
    expected = on_cpu(args)
    reference.echo_scores(*expected)
    ops.echo_scores(*args)
    assert expected[-1].isnan().sum() == 100 - SEGMENT
    assert_close("echo", args[-1], expected[-1])


def turned(x, position, frequency):
    """RoPE in the style of NeoX, as in a model."""
    angle = position[:, None, None] * torch.cat([frequency, frequency])
    left, right = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-right, left], dim=-1) * angle.sin()


def test_against_a_literal_repetition(device):
    """An oracle that shares no code with the reference: rotated by a model's own embedding, keys
    laid out flat, one query at a time, with plain sums of exponentials."""
    n, m, delta, group, size = 150, 64, 256, 2, 32
    batch = make_batch([Request(n, n)], LAYERS, HEADS, 16, size, torch.float32)
    frequency = 10000.0 ** (-torch.arange(size // 2) / (size // 2))
    raw, at = torch.randn(n, HEADS * group, size), torch.arange(n)
    args = arguments(batch, group, size, torch.float32, device,
                     segments=segments_of(batch, m))  # fmt: skip
    args[QUERY] = turned(raw, at, frequency).to(device)
    args[ROTATION] = torch.stack([(delta * frequency).cos(), (delta * frequency).sin()], -1).to(
        device
    )
    ops.echo_scores(*args)
    pages = batch.pages.view(-1, LAYERS, HEADS, 16, 2 * size)[batch.block_table[0].long(), LAYER]
    keys = pages.transpose(0, 1).flatten(1, 2)[:, :n, :size]
    first, again = turned(raw, at, frequency), turned(raw, at + delta, frequency)
    expected = torch.zeros(HEADS, n)
    for h in range(HEADS * group):
        key = keys[h // group].double()
        for i in range(n):
            a = i // m * m
            b = min(n, a + m)
            echo = (key @ again[i, h].double() / size**0.5).exp()
            past = (key @ first[i, h].double() / size**0.5).exp()
            total = echo[:4].sum() + echo[a:b].sum() + past[a : i + 1].sum()
            row = expected[h // group, a:b]
            torch.maximum(row, (echo[a:b] / total).float(), out=row)
    scores = args[-1].view(-1, LAYERS, HEADS, 16).cpu()[batch.block_table[0].long(), LAYER]
    assert_close("echo", scores.transpose(0, 1).flatten(1)[:, :n], expected)


def test_sinks_of_a_packed_request_are_the_first_keys_that_were_kept(device):
    """And each head's keys begin in a page of its own."""
    batch = make_batch([Request(40, 40, packed=[1, 3, 2, 2], covered=6)], LAYERS, HEADS, 16, 32,
                       torch.float32)  # fmt: skip
    args = arguments(batch, 1, 32, torch.float32, device)
    check(args)
    before = args[-1].clone()
    slot = int(batch.state_slot[0])
    for head in range(HEADS):
        first = int(batch.first_page[slot, LAYER, head])
        # By hand: its first packed page, counted from the request's first packed block on.
        page = int(batch.block_table[0, first // SLOTS]) * SLOTS + first % SLOTS
        args[PAGES][page, :4, :32] *= 3
        ops.echo_scores(*args)
        assert (args[-1] != before).any()
        check(args)
        before = args[-1].clone()


def replaced(args, index, change):
    return [change(a) if i == index else a for i, a in enumerate(args)]


BAD = [
    ("query", 0, lambda t: t.half()),
    ("query", 0, lambda t: t[:, :3]),
    ("query", 0, lambda t: t[0]),
    ("query", 0, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
    ("pages", 1, lambda t: t[:, :, :-2].contiguous()),
    ("pages", 1, lambda t: t[:-1]),
    ("block_table", 2, lambda t: t.long()),
    ("seq_lens", 3, lambda t: t[:-1]),
    ("state_slot", 4, lambda t: t.long()),
    ("num_pages", 5, lambda t: t[0]),
    ("first_page", 6, lambda t: t[:1]),
    ("covered", 7, lambda t: t[:1]),
    ("segments", 10, lambda t: t.long()),
    ("segments", 10, lambda t: t[:, :3].contiguous()),
    ("segments", 10, lambda t: t.flatten()),
    ("segments", 10, lambda t: t.t().contiguous().t()),
    ("rotation", 11, lambda t: t.double()),
    ("rotation", 11, lambda t: t.repeat(2, 1)),
    ("rotation", 11, lambda t: t[:, :1].contiguous()),
    ("rotation", 11, lambda t: t[::2]),
    ("layer", 12, lambda n: LAYERS),
    ("layer", 12, lambda n: -1),
    ("max_segment", 13, lambda n: 0),
    ("num_sinks", 14, lambda n: -1),
    ("scores", 17, lambda t: t.half()),
    ("scores", 17, lambda t: t[:-1]),
    ("scores", 17, lambda t: t[:, :8].contiguous()),
    ("scores", 17, lambda t: t.t().contiguous().t()),
]


@pytest.mark.parametrize(("name", "index", "change"), BAD)
def test_bad_argument_is_named(device, name, index, change):
    batch = make_batch([Request(20, 20), Request(33, 3)], LAYERS, HEADS, 16, 32, torch.float32)
    args = arguments(batch, 2, 32, torch.float32, device)
    ops.echo_scores(*args)
    with pytest.raises(RuntimeError, match=name):
        ops.echo_scores(*replaced(args, index, change))


def changed(column, by):
    def change(segments):
        segments = segments.clone()
        segments[-1, column] += by
        return segments

    return change


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("block_table", 2, lambda t: t.where(t != t[0, 1], POISON_ID)),
        ("block_table", 2, lambda t: t[:, :1]),
        ("state_slot", 4, lambda t: t + POISON_ID),
        ("segments names row 2 of 2", 10, changed(0, 1)),
        ("segments names row -1", 10, changed(0, -2)),
        ("segments has the positions", 10, changed(1, -31)),
        ("segments has the positions", 10, changed(1, 3)),
        ("segments has the positions", 10, changed(2, 1)),
        ("segments names the tokens", 10, changed(3, 1)),
        ("segments names the tokens", 10, changed(3, -21)),
        ("max_segment", 13, lambda n: 19),
    ],
)
def test_bad_value_is_refused_on_the_cpu(name, index, change):
    """CUDA does not look: reading a value would wait for the GPU."""
    if not ops.backends()["CPU"]["echo_scores"]:
        pytest.skip("no native CPU kernels are built")
    batch = make_batch([Request(20, 20), Request(33, 3)], LAYERS, HEADS, 16, 32, torch.float32)
    args = arguments(batch, 2, 32, torch.float32, "cpu")
    args[QUERY] = args[QUERY][:23]
    ops.echo_scores(*args)
    with pytest.raises(RuntimeError, match=name):
        ops.echo_scores(*replaced(args, index, change))


def test_segments_of_covered_blocks_are_refused_on_the_cpu():
    if not ops.backends()["CPU"]["echo_scores"]:
        pytest.skip("no native CPU kernels are built")
    batch = make_batch([Request(20, 20, packed=[1] * SLOTS, covered=2)], LAYERS, HEADS, 16, 32,
                       torch.float32)  # fmt: skip
    args = arguments(batch, 2, 32, torch.float32, "cpu")
    args[SEGMENTS][0, 1] -= 1
    with pytest.raises(RuntimeError, match="segments has the positions 31 to 52"):
        ops.echo_scores(*args)
