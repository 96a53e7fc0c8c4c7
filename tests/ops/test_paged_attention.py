# SPDX-License-Identifier: Apache-2.0
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

LAYERS, HEADS = 3, 2
SLOTS = LAYERS * HEADS


def arguments(batch, group, head_size, dtype, device, layer=1, scale=None):
    """Arguments on ``device``; ``out`` is a slice of a buffer of sevens, as long as ``query``."""
    heads = batch.num_pages.shape[2]
    num_tokens = int(batch.query_start[-1])
    query, _, _ = fused_qkv(num_tokens, heads, group, head_size, dtype, device)
    wide = torch.full((len(query), heads * group + 1, head_size), 7.0, dtype=dtype, device=device)
    b = batch.to(device)
    scale = head_size**-0.5 if scale is None else scale
    return [query, b.pages, *b.rows(), b.query_start, layer, scale, wide[:, 1:]]


def on_cpu(args):
    return [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]


def check(args, what="attention", **logits):
    expected = on_cpu(args)
    expected[-1] = expected[-1].clone()
    reference.paged_attention(*expected, **moved(logits, "cpu"))
    ops.paged_attention(*args, **logits)
    assert_close(what, args[-1], expected[-1])
    num_tokens = int(args[10][-1])
    assert args[-1][:num_tokens].isfinite().all()
    assert (args[-1][num_tokens:] == 7).all()


def check_or_refused(args, limit):
    """``limit``: what CUDA says it cannot do with these arguments; None: nothing."""
    if limit is None or args[0].device.type != "cuda":
        check(args)
        return
    with pytest.raises(RuntimeError, match=limit):
        ops.paged_attention(*args)


def hostile(block_size):
    """Every kind of row at once."""
    return [
        Request(tail=block_size + 1, queries=block_size + 1),
        Request(tail=1),
        Request(tail=1, packed=uneven(2 * SLOTS, SLOTS), covered=5),
        Request(tail=0, queries=0),  # a padded row: its table is poison
        Request(tail=block_size + 3, queries=block_size + 3, packed=[2] * SLOTS, covered=4),
        Request(tail=2 * block_size + 5, queries=5),
        Request(tail=block_size, queries=2, packed=uneven(SLOTS, SLOTS), covered=1),
        Request(tail=3 * 64 + 7, queries=90),
        Request(tail=0, queries=0),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_hostile_batch(device, dtype, group, head_size, block_size):
    batch = make_batch(hostile(block_size), LAYERS, HEADS, block_size, head_size, dtype)
    check(arguments(batch, group, head_size, dtype, device))


@pytest.mark.parametrize("head_size", [8, 40, 72, 96, 112, 160, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [3, 16])
def test_other_head_sizes(device, head_size, dtype, group):
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, head_size, dtype)
    limit = None if head_size in CUDA_HEAD_SIZES else f"head size must be .* not {head_size}"
    check_or_refused(arguments(batch, group, head_size, dtype, device), limit)


@pytest.mark.parametrize("queries", [1, 3, "all"])
@pytest.mark.parametrize("tail", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300])
def test_lengths_at_edges(device, tail, queries):
    """Around blocks, tiles of keys and tiles of queries; with and without a packed context."""
    n = tail if queries == "all" else min(queries, tail)
    rows = [Request(tail, n), Request(tail, n, packed=uneven(SLOTS * 3, SLOTS), covered=20)]
    batch = make_batch(rows, LAYERS, HEADS, 16, 32, torch.float32)
    check(arguments(batch, 2, 32, torch.float32, device))


@pytest.mark.parametrize("block_size", [1, 24, 128])
def test_blocks_that_do_not_divide_a_tile(device, block_size):
    rows = [Request(300, 200), Request(200, 1, packed=uneven(SLOTS, SLOTS), covered=2)]
    batch = make_batch(rows, LAYERS, HEADS, block_size, 32, torch.float32)
    limit = None if block_size == 128 else "pages must hold a power of two of tokens from 8 on"
    check_or_refused(arguments(batch, 2, 32, torch.float32, device), limit)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_every_layer_reads_its_own_pages(device, layer):
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 32, torch.float32)
    check(arguments(batch, 2, 32, torch.float32, device, layer=layer))


def test_one_layer_one_head(device):
    rows = [Request(40, 3), Request(5, 5, packed=[2], covered=9)]
    batch = make_batch(rows, 1, 1, 16, 64, torch.float32)
    check(arguments(batch, 1, 64, torch.float32, device, layer=0))


def test_large_group_fills_a_tile_with_one_token(device):
    batch = make_batch([Request(40, 3), Request(70, 70)], 1, 1, 16, 32, torch.float32)
    limit = "query must have 1 to 16 heads per KV head on CUDA, not 200"
    check_or_refused(arguments(batch, 200, 32, torch.float32, device, layer=0), limit)


@pytest.mark.parametrize("scale", [0.0, 20.0])
def test_flat_and_peaked_softmax(device, scale):
    """Logits from none to +-500: the running maximum is needed, and is followed."""
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 32, torch.float32)
    check(arguments(batch, 2, 32, torch.float32, device, scale=scale), "peaked attention")


MANY = [(37 * r) % 199 + 1 for r in range(300)]
SHARED_OUT = {
    # Tokens of each request (0: a padded row), KV heads. On CUDA the keys form one line that is cut
    # wherever the share of a warp ends; some of these are short, some span many warps and blocks.
    "one key": ([1], 1),
    "a few long heads": ([9000, 1, 2500], 2),
    "many short heads": (MANY, 8),
    "padded rows between": ([0, 0, 700, 0, 3, 0, 0, 0, 90, 1, 0], 3),
    "more heads than a warp has lanes": ([100, 5, 33], 40),
}


@pytest.mark.parametrize("case", SHARED_OUT)
@pytest.mark.parametrize("packed", [False, True])
def test_decode_work_of_any_shape(device, case, packed):
    tails, heads = SHARED_OUT[case]
    rows = []
    for i, tail in enumerate(tails):
        request = Request(tail, min(tail, 1))
        if packed and tail and i % 3 != 1:
            request.packed, request.covered = uneven((1 + i % 4) * heads, heads), 4 + i % 5
        rows.append(request)
    batch = make_batch(rows, 1, heads, 16, 64, torch.bfloat16)
    check(arguments(batch, 4, 64, torch.bfloat16, device, layer=0))


def speculating(most, block_size=16):
    """Rows of one token to ``most``, as a step of speculation has them, in every state."""
    counts = [most, 1, most, max(1, most - 1), 0, most, 2 if most > 1 else 1]
    return [
        Request(0, 0) if count == 0 else
        Request(tail, count, packed=uneven(pages * SLOTS, SLOTS), covered=9) if pages else
        Request(tail, count)
        for count, tail, pages in zip(
            counts, [most, 300, most + 3, 40, 0, block_size + most, 33], [0, 0, 2, 3, 0, 1, 0],
            strict=True,
        )
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("most, group", [
    (2, 1), (5, 1), (5, 2), (2, 4), (5, 4), (6, 4), (7, 4), (3, 5), (5, 7), (2, 8), (5, 8), (2, 16),
    (5, 16), (21, 1),
])  # fmt: skip
def test_speculating_rows(device, dtype, most, group):
    """One tile of columns to three, in one pass over the keys or in several."""
    batch = make_batch(speculating(most), LAYERS, HEADS, 16, 64, dtype)
    check(arguments(batch, group, 64, dtype, device), decode_query_len=most)


@pytest.mark.parametrize("head_size", [32, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_speculating_heads(device, dtype, head_size):
    """Larger heads have fewer tiles."""
    batch = make_batch(speculating(5), LAYERS, HEADS, 16, head_size, dtype)
    check(arguments(batch, 4, head_size, dtype, device), decode_query_len=5)


@pytest.mark.parametrize("most", [1, 2, 5, 90, 1 << 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_speculating_beside_prompts(device, dtype, most):
    """Which rows are read in one pass changes no result."""
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 64, dtype)
    check(arguments(batch, 4, 64, dtype, device), decode_query_len=most)


@pytest.mark.parametrize("tails", [[9000, 1, 2500], [(37 * r) % 199 + 5 for r in range(300)]])
@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_speculating_work_of_any_shape(device, tails, group, packed):
    """Borders between warps and blocks cut passes of fewer tokens, too."""
    pages = 40 * 3
    rows = [
        Request(tail, min(tail, 1 + r % 5), packed=uneven(pages, 3 * 8) if packed else None,
                covered=50 * packed)
        for r, tail in enumerate(tails)
    ]  # fmt: skip
    batch = make_batch(rows, LAYERS, 8, 16, 128, torch.bfloat16)
    check(arguments(batch, group, 128, torch.bfloat16, device), decode_query_len=5)


def test_speculating_with_caps_and_sinks(device):
    for dtype in DTYPES:
        batch = make_batch(speculating(5), LAYERS, HEADS, 16, 64, dtype)
        sinks = torch.randn(HEADS * 4, device=device)
        sinks[1] = float("-inf")
        check(arguments(batch, 4, 64, dtype, device), decode_query_len=5, soft_cap=1.5,
              sink_logits=sinks)  # fmt: skip


@pytest.mark.parametrize("length", [0, -1])
def test_no_tokens_together(device, length):
    batch = make_batch([Request(5)], LAYERS, HEADS, 16, 64, torch.float32)
    with pytest.raises(RuntimeError, match=f"decode_query_len must be 1 or more, not {length}"):
        ops.paged_attention(
            *arguments(batch, 2, 64, torch.float32, device), decode_query_len=length
        )


@pytest.mark.parametrize("rows", [[], [Request(0, 0)], [Request(0, 0), Request(0, 0)]])
def test_empty_batches(device, rows):
    batch = make_batch(rows, LAYERS, HEADS, 16, 32, torch.float32)
    check(arguments(batch, 2, 32, torch.float32, device))


def test_token_without_keys_gives_zeros(device):
    """A padded row that claims one token and no cache, as in a CUDA graph."""
    batch = make_batch([Request(20), Request(0, 1)], LAYERS, HEADS, 16, 32, torch.float32)
    args = arguments(batch, 2, 32, torch.float32, device)
    check(args)
    assert (args[-1][1] == 0).all()


def test_row_without_queries_may_point_to_a_packed_request(device):
    """A padded row keeps the table of whoever had the row before, so its state is found too."""
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 32, torch.float32)
    batch.block_table[3] = batch.block_table[2]
    batch.state_slot[3] = batch.state_slot[2]
    check(arguments(batch, 2, 32, torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_free_memory_does_not_matter(device, dtype):
    batch = make_batch(hostile(16), LAYERS, HEADS, 16, 64, dtype)
    args = arguments(batch, 2, 64, dtype, device)
    ops.paged_attention(*args)
    for value in (0.0, 1.0, float("inf")):
        other = [*args[:-1], torch.full_like(args[-1], 7.0)]
        other[1] = batch.poisoned(value).pages.to(device)
        ops.paged_attention(*other)
        assert_same_bits(other[-1], args[-1])


@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_stays_visible(device, where):
    """Garbage from the model must not come out as a finite answer."""
    batch = make_batch([Request(20, 4), Request(33, 1)], LAYERS, HEADS, 16, 32, torch.float32)
    args = arguments(batch, 2, 32, torch.float32, device)
    if where == "query":
        args[0][1, 3] = float("nan")
    else:
        args[1][int(args[2][0, 0]) * SLOTS + HEADS + 1, 3, 5] = float("nan")
    expected = on_cpu(args)
    expected[-1] = expected[-1].clone()
    reference.paged_attention(*expected)
    ops.paged_attention(*args)
    assert expected[-1].isnan().any()
    assert_close("attention", args[-1], expected[-1])


def test_against_torch_attention(device):
    """An oracle that shares no code with the reference: PyTorch's, on the same K/V laid out flat.

    Keys are in order in an unpacked row, so its pages are gathered by table, without the layout.
    """
    heads, group, head_size, n = 2, 3, 64, 150
    batch = make_batch([Request(n, 100)], 1, heads, 16, head_size, torch.float32)
    args = arguments(batch, group, head_size, torch.float32, device, layer=0)
    ops.paged_attention(*args)
    blocks = args[1].view(-1, heads, 16, 2 * head_size)[args[2][0].long()]
    key, value = blocks.transpose(0, 1).flatten(1, 2)[:, :n].split(head_size, dim=-1)
    query = args[0][:100].transpose(0, 1)
    mask = torch.ones(100, n, dtype=torch.bool, device=device).tril(n - 100)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    assert_close("attention", args[-1][:100], expected)


def replaced(index, change):
    def apply(args):
        args = list(args)
        args[index] = change(args[index])
        return args

    return apply


BAD = [
    ("query", 0, lambda t: t.half()),
    ("query", 0, lambda t: t[:, :3]),
    ("query", 0, lambda t: t[0]),
    ("pages", 1, lambda t: t[:, :, :-2].contiguous()),
    ("pages", 1, lambda t: t[:-1]),
    ("pages", 1, lambda t: t[:, ::2]),
    ("pages", 1, lambda t: t.int()),
    ("block_table", 2, lambda t: t.long()),
    ("block_table", 2, lambda t: t.t().contiguous().t()),
    ("seq_lens", 3, lambda t: t[:-1]),
    ("seq_lens", 3, lambda t: t.long()),
    ("state_slot", 4, lambda t: t[:-1]),
    ("num_pages", 5, lambda t: t[0]),
    ("first_page", 6, lambda t: t[:1]),
    ("covered", 7, lambda t: t[:1]),
    ("query_start", 10, lambda t: t[:-1]),
    ("query_start", 10, lambda t: t.long()),
    ("layer", 11, lambda t: LAYERS),
    ("layer", 11, lambda t: -1),
    ("out", 13, lambda t: t.half()),
    ("out", 13, lambda t: t[:, :2]),
    ("out", 13, lambda t: t[..., :16]),
]


@pytest.mark.parametrize(("name", "index", "change"), BAD)
def test_bad_argument_is_named(device, name, index, change):
    batch = make_batch([Request(20), Request(33)], LAYERS, HEADS, 16, 32, torch.float32)
    args = arguments(batch, 2, 32, torch.float32, device)
    ops.paged_attention(*args)
    with pytest.raises(RuntimeError, match=name):
        ops.paged_attention(*replaced(index, change)(args))


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        ("block_table", 2, lambda t: t.where(t != t[0, 1], POISON_ID)),
        ("block_table", 2, lambda t: t.where(t != t[0, 1], -1)),
        ("block_table", 2, lambda t: t[:, :1]),
        ("state_slot", 4, lambda t: t + POISON_ID),
        ("seq_lens", 3, lambda t: t * 100),
        ("query_start", 10, lambda t: t * 100),
        ("query_start", 10, lambda t: t - 1),
    ],
)
def test_bad_value_is_refused_on_the_cpu(name, index, change):
    """CUDA does not look: reading a value would wait for the GPU, and cannot be captured."""
    if not ops.backends()["CPU"]["paged_attention"]:
        pytest.skip("no native CPU kernels are built")
    batch = make_batch([Request(20), Request(33)], LAYERS, HEADS, 16, 32, torch.float32)
    args = arguments(batch, 2, 32, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=name):
        ops.paged_attention(*replaced(index, change)(args))
