# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import DTYPES, assert_same_bits, fused_qkv

from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 4, 7])
@pytest.mark.parametrize("head_size", [32, 80, 128])
@pytest.mark.parametrize("num_tokens", [0, 1, 7, 600])
def test_copies_only_the_observed_queries(device, dtype, group, head_size, num_tokens):
    heads, places = 2, 24
    query, _, _ = fused_qkv(num_tokens, heads, group, head_size, dtype, device)
    index = torch.full((num_tokens,), -1, dtype=torch.int32)
    chosen = torch.randperm(num_tokens)[:places]
    index[chosen] = torch.randperm(places)[: len(chosen)].int()
    # The ring of one layer out of three, observation slots and window flattened.
    rings = torch.full((3, places, heads * group, head_size), float("nan"), dtype=dtype)
    expected = rings.clone()
    reference.observe_queries(query.cpu(), index, expected[1])
    actual = rings.to(device)
    ops.observe_queries(query, index.to(device), actual[1])
    assert_same_bits(actual, expected)
    assert expected.isfinite().sum() == len(chosen) * heads * group * head_size


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("query", lambda a: a | {"query": a["query"].half()}),
        ("query", lambda a: a | {"query": a["query"][:, :3]}),
        ("query", lambda a: a | {"query": a["query"][:2]}),
        ("query", lambda a: a | {"query": a["query"][..., ::2].repeat(1, 1, 2)[..., ::2]}),
        ("ring_index", lambda a: a | {"ring_index": a["ring_index"].long()}),
        ("ring_index", lambda a: a | {"ring_index": a["ring_index"][None]}),
        ("ring", lambda a: a | {"ring": a["ring"][0]}),
        ("ring", lambda a: a | {"ring": a["ring"].int()}),
    ],
)
def test_bad_argument_is_named(device, name, change):
    arguments = {
        "query": torch.zeros(4, 4, 32, device=device),
        "ring_index": torch.arange(4, device=device, dtype=torch.int32),
        "ring": torch.zeros(8, 4, 32, device=device),
    }
    ops.observe_queries(*arguments.values())
    with pytest.raises(RuntimeError, match=name):
        ops.observe_queries(*change(arguments).values())


def test_index_beyond_the_ring_is_refused_on_the_cpu():
    """CUDA does not look: reading a value would wait for the GPU, and cannot be captured."""
    if not ops.backends()["CPU"]["observe_queries"]:
        pytest.skip("no native CPU kernels are built")
    with pytest.raises(RuntimeError, match="ring_index names place 8 of 8"):
        ops.observe_queries(
            torch.zeros(1, 4, 32), torch.tensor([8], dtype=torch.int32), torch.zeros(8, 4, 32)
        )
