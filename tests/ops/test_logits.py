# SPDX-License-Identifier: Apache-2.0
"""Soft caps and learnt sinks, in every op that turns products into probabilities."""

from __future__ import annotations

import math

import pytest
import test_attention_statistics as statistics
import test_echo_scores as echo
import test_page_formats as formats
import test_paged_attention as attention
import torch
from cases import DTYPES, Request, assert_close, assert_same_bits, make_batch, moved, uneven
from op_examples import example

from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat

OPS = ("paged_attention", "attention_statistics", "echo_scores")
LAYERS, HEADS = formats.LAYERS, formats.HEADS
SLOTS = LAYERS * HEADS
KINDS = pytest.mark.parametrize("kind", ["cap", "sinks", "both"])


def sinks(*shape, device="cpu"):
    """Of every kind: among the logits, far above and far below them, and none."""
    found = 2 * torch.randn(*shape)
    for value, start in ((30.0, 0), (-math.inf, 5), (-40.0, 10)):
        found.view(-1)[start::15] = value
    return found.to(device)


def logits_of(kind, *shape, device="cpu", cap=1.5):
    """Keyword arguments; a cap that most logits of a random batch reach."""
    found = {}
    if kind != "sinks":
        found["soft_cap"] = cap
    if kind != "cap":
        found["sink_logits"] = sinks(*shape, device=device)
    return found


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("head_size", [32, 80, 128])
def test_attention(device, kind, dtype, group, head_size):
    rows = attention.hostile(16)
    batch = make_batch(rows, attention.LAYERS, HEADS, 16, head_size, dtype)
    args = attention.arguments(batch, group, head_size, dtype, device, scale=2 * head_size**-0.5)
    attention.check(args, **logits_of(kind, HEADS * group, device=device))


@KINDS
@pytest.mark.parametrize("case", attention.SHARED_OUT)
def test_decode_work_of_any_shape(device, kind, case):
    """A sink counts once, wherever the keys of its head are cut."""
    tails, heads = attention.SHARED_OUT[case]
    rows = [
        Request(tail, min(tail, 1), uneven((1 + i % 4) * heads, heads), 4 + i % 5)
        if tail and i % 3 != 1 else Request(tail, min(tail, 1))
        for i, tail in enumerate(tails)
    ]  # fmt: skip
    batch = make_batch(rows, 1, heads, 16, 64, torch.bfloat16)
    args = attention.arguments(batch, 4, 64, torch.bfloat16, device, layer=0)
    attention.check(args, **logits_of(kind, heads * 4, device=device))


@formats.FORMATS
@formats.DTYPES
@KINDS
def test_codes(device, page_format, dtype, kind):
    head_size = 64
    batch = formats.batch_of(page_format, head_size, dtype)
    found = formats.attend(batch, 4, head_size, dtype, device, **logits_of(kind, HEADS * 4, cap=3))
    assert_close("attention to codes", *found)
    formats.measure(batch, head_size, dtype, device, **logits_of(kind, LAYERS, HEADS * 2, cap=3))
    formats.score(batch, head_size, dtype, device, **logits_of(kind, HEADS * 3, cap=3))


@formats.FORMATS
@KINDS
def test_codes_of_decode_rows(device, page_format, kind):
    """One token each: heads that are cut within pages and at their end."""
    rows = [
        Request(tail=1 + 7 * i, packed=uneven(SLOTS * (1 + 5 * i), SLOTS), covered=6 * i + 2)
        for i in range(9)
    ]
    batch = make_batch(rows, LAYERS, HEADS, 16, 128, torch.bfloat16, 3, page_format)
    logits = logits_of(kind, HEADS * 4, cap=3)
    found = formats.attend(batch, 4, 128, torch.bfloat16, device, **logits)
    assert_close("attention to codes", *found)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("head_size", [32, 128])
def test_statistics(device, kind, dtype, group, head_size):
    rows = statistics.hostile(16)
    args = statistics.arguments(rows, [8, 5, 7, 0, 1, 8], 8, group, head_size, 16, dtype, device)
    statistics.check(args, **logits_of(kind, LAYERS, HEADS * group, device=device))


def test_statistics_of_queries_older_than_all_keys(device):
    """A sink alone makes no key that is not there."""
    rows = [Request(tail=3, packed=[1, 0, 0, 3], covered=4)]
    args = statistics.arguments(rows, [8], 8, 2, 32, 16, torch.float32, device)
    statistics.check(args, **logits_of("both", LAYERS, HEADS * 2, device=device))


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("head_size", [32, 192])
def test_echo(device, kind, dtype, group, head_size):
    batch = make_batch(echo.hostile(16), LAYERS, HEADS, 16, head_size, dtype)
    for scale in (2 * head_size**-0.5, -(head_size**-0.5)):
        args = echo.arguments(batch, group, head_size, dtype, device, scale=scale)
        echo.check(args, **logits_of(kind, HEADS * group, device=device))


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_peaked_logits_are_capped(device, cap):
    """Products of hundreds: at the cap nothing overflows, and many keys share the softmax."""
    batch = make_batch(attention.hostile(16), attention.LAYERS, HEADS, 16, 32, torch.float32)
    args = attention.arguments(batch, 2, 32, torch.float32, device, scale=20.0)
    attention.check(args, "peaked attention", soft_cap=cap)


def test_literal_formulas(device):
    """An oracle that shares no code with the reference: one query at a time, in fp64."""
    n, group, size, scale, cap = 70, 3, 32, 0.4, 2.5
    batch = make_batch([Request(n, 20)], 1, HEADS, 16, size, torch.float32)
    learnt = sinks(HEADS * group)
    args = attention.arguments(batch, group, size, torch.float32, device, layer=0, scale=scale)
    ops.paged_attention(*args, soft_cap=cap, sink_logits=learnt.to(device))
    blocks = batch.pages.view(-1, HEADS, 16, 2 * size)[batch.block_table[0].long()]
    keys, values = blocks.transpose(0, 1).flatten(1, 2)[:, :n].double().split(size, dim=-1)
    expected = torch.zeros(20, HEADS * group, size)
    for i in range(20):
        for h in range(HEADS * group):
            k, v = keys[h // group, : n - 19 + i], values[h // group, : n - 19 + i]
            x = [cap * math.tanh(float(q) * scale / cap) for q in k @ args[0][i, h].cpu().double()]
            weights = torch.tensor([math.exp(y) for y in x]).double()
            total = weights.sum() + math.exp(float(learnt[h]))
            expected[i, h] = (weights @ v / total).float()
    assert_close("attention", args[-1][:20], expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("page_format", list(PageFormat), ids=lambda f: f.label)
def test_absent_sinks_change_no_bit(device, op, page_format):
    args = example(op, device, page_format=page_format)
    shape = sink_shape(op, args)
    results = []
    for logits in ({}, {"sink_logits": torch.full(shape, -math.inf, device=device)}):
        if op != "attention_statistics":
            args[-1] = torch.zeros_like(args[-1])
        found = getattr(ops, op)(*args, **logits)
        results.append(args[-1] if found is None else found)
    assert_same_bits(*results)


def sink_shape(op, args):
    ring = op == "attention_statistics"
    return (args[0].shape[0], args[0].shape[3]) if ring else args[0].shape[1:2]


def test_token_without_keys_gives_zeros(device):
    batch = make_batch([Request(20), Request(0, 1)], attention.LAYERS, HEADS, 16, 32, torch.float32)
    args = attention.arguments(batch, 2, 32, torch.float32, device)
    attention.check(args, **logits_of("both", HEADS * 2, device=device))
    assert (args[-1][1] == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_nan_stays_visible(device, op):
    """Of a sink that the model spoilt, in every head of its own."""
    args = example(op, device)
    shape = sink_shape(op, args)
    spoilt = torch.zeros(shape, device=device)
    spoilt[..., 0] = math.nan
    found = getattr(ops, op)(*args, sink_logits=spoilt)
    if op == "paged_attention":
        assert args[-1][:, 0].isnan().all() and args[-1][:, 1:].isfinite().all()
    elif op == "echo_scores":
        assert args[-1].isnan().any() and not args[-1].isnan().all()
    else:
        assert found[ops.SUM].isnan().any() and not found[ops.SUM].isnan().all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("page_format", list(PageFormat), ids=lambda f: f.label)
def test_opcheck(device, op, page_format):
    args = example(op, device, page_format=page_format)
    kwargs = logits_of("both", *sink_shape(op, args), device=device)
    torch.library.opcheck(
        getattr(torch.ops.kvcompress_vllm, op).default,
        tuple(args),
        kwargs,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


BAD = [
    ("soft_cap", -1.0),
    ("soft_cap", math.nan),
    ("soft_cap", math.inf),
    ("sink_logits", lambda t: t.half()),
    ("sink_logits", lambda t: t[..., :-1].contiguous()),
    ("sink_logits", lambda t: t.repeat_interleave(2, -1)[..., ::2]),
    ("sink_logits", lambda t: t[None]),
    ("sink_logits", lambda t: t.sum()),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_argument_is_named(device, op, name, value):
    args = example(op, device)
    if callable(value):
        value = value(torch.zeros(sink_shape(op, args), device=device))
    with pytest.raises(RuntimeError, match=name):
        getattr(ops, op)(*args, **{name: value})


@pytest.mark.gpu
@pytest.mark.parametrize("page_format", list(PageFormat), ids=lambda f: f.label)
def test_captured_decode_step(page_format):
    """A graph reads the sinks when it is replayed."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = [
        Request(tail=2 + 5 * i, packed=uneven(SLOTS * (1 + 3 * i), SLOTS), covered=4 * i + 2)
        for i in range(5)
    ]
    batch = make_batch(rows, LAYERS, HEADS, 16, 128, torch.bfloat16, 3, page_format).to("cuda")
    query = torch.randn(len(rows), HEADS * 4, 128, device="cuda").bfloat16()
    out, again = torch.zeros_like(query), torch.zeros_like(query)
    logits = moved(logits_of("both", HEADS * 4, cap=3), "cuda")

    def step(target):
        ops.paged_attention(
            query, batch.pages, *batch.rows(), batch.query_start, 1, 128**-0.5, target, **logits
        )

    step(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(out)
    before = out.clone()
    logits["sink_logits"].add_(1)
    graph.replay()
    step(again)
    assert_same_bits(out, again)
    assert (out != before).any()
