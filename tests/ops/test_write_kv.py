# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from cases import DTYPES, assert_same_bits, fused_qkv

from kvcompress_vllm import ops
from kvcompress_vllm.ops import reference


def layer_of_cache(blocks, layers, heads, block_size, head_size, dtype):
    """The middle layer of a poisoned buffer: a strided view."""
    buffer = torch.full((blocks, layers, heads, block_size, 2 * head_size), float("nan")).to(dtype)
    return buffer, buffer[:, layers // 2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("edge", [-1, 0, 1])
def test_writes_only_the_named_slots(device, dtype, head_size, block_size, edge):
    num_tokens, heads, blocks = block_size + edge, 2, 5
    buffer, _ = layer_of_cache(blocks, 3, heads, block_size, head_size, dtype)
    _, key, value = fused_qkv(num_tokens, heads, 2, head_size, dtype, device)
    slots = torch.randperm(blocks * block_size)[:num_tokens]
    slots[::3] = -1
    expected = buffer.clone()
    reference.write_kv(key.cpu(), value.cpu(), expected[:, 1], slots)
    actual = buffer.to(device)
    ops.write_kv(key, value, actual[:, 1], slots.to(device))
    assert_same_bits(actual, expected)
    assert (slots >= 0).sum() * heads * head_size * 2 == expected.isfinite().sum()


def test_key_and_value_with_strides_of_their_own(device):
    """The key from a fused projection, the value heads first and with a gap between tokens."""
    buffer, _ = layer_of_cache(3, 1, 2, 16, 32, torch.float32)
    _, key, _ = fused_qkv(9, 2, 3, 32, torch.float32, device)
    value = torch.randn(2, 15, 40, device=device)[:, 1:12, 8:].transpose(0, 1)
    slots = torch.randperm(48)[:9]
    expected = buffer.clone()
    reference.write_kv(key.cpu(), value.cpu(), expected[:, 0], slots)
    actual = buffer.to(device)
    ops.write_kv(key, value, actual[:, 0], slots.to(device))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_write(device, num_tokens):
    buffer, _ = layer_of_cache(3, 1, 2, 16, 32, torch.float32)
    _, key, value = fused_qkv(num_tokens, 2, 1, 32, torch.float32, device)
    actual = buffer.to(device)
    ops.write_kv(key, value, actual[:, 0], torch.full((num_tokens,), -1, device=device))
    assert_same_bits(actual, buffer)


def test_many_tokens(device):
    """Enough for several threads."""
    buffer, _ = layer_of_cache(200, 1, 8, 16, 128, torch.bfloat16)
    _, key, value = fused_qkv(3000, 8, 1, 128, torch.bfloat16, device)
    slots = torch.randperm(3200)[:3000]
    expected = buffer.clone()
    reference.write_kv(key.cpu(), value.cpu(), expected[:, 0], slots)
    actual = buffer.to(device)
    ops.write_kv(key, value, actual[:, 0], slots.to(device))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("key", lambda a: a | {"key": a["key"].double()}),
        ("key", lambda a: a | {"key": a["key"][:, :1]}),
        ("key", lambda a: a | {"key": a["key"].transpose(1, 2).contiguous().transpose(1, 2)}),
        ("value", lambda a: a | {"value": a["value"][..., :16]}),
        ("value", lambda a: a | {"value": a["value"][0]}),
        ("slot_mapping", lambda a: a | {"slot_mapping": a["slot_mapping"].int()}),
        ("slot_mapping", lambda a: a | {"slot_mapping": a["slot_mapping"].repeat(9)}),
        ("kv_cache", lambda a: a | {"kv_cache": a["kv_cache"][..., :32]}),
        ("kv_cache", lambda a: a | {"kv_cache": a["kv_cache"].long()}),
    ],
)
def test_bad_argument_is_named(device, name, change):
    arguments = {
        "key": torch.zeros(4, 2, 32, device=device),
        "value": torch.zeros(4, 2, 32, device=device),
        "kv_cache": torch.zeros(3, 2, 8, 64, device=device),
        "slot_mapping": torch.arange(4, device=device),
    }
    ops.write_kv(*arguments.values())
    with pytest.raises(RuntimeError, match=name):
        ops.write_kv(*change(arguments).values())


def test_slot_beyond_the_cache_is_refused_on_the_cpu():
    """CUDA does not look: reading a value would wait for the GPU, and cannot be captured."""
    if not ops.backends()["CPU"]["write_kv"]:
        pytest.skip("no native CPU kernels are built")
    zeros = torch.zeros(1, 2, 32)
    with pytest.raises(RuntimeError, match="slot_mapping names slot 24 of 24"):
        ops.write_kv(zeros, zeros, torch.zeros(3, 2, 8, 64), torch.tensor([24]))
