# SPDX-License-Identifier: Apache-2.0
"""Families of models whose layers are of several kinds, and (slow) all others; see
``tests/families.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvcompress_vllm.integration.cpu.attention import attend
from tests.families import FAMILIES, examine

ALWAYS = ("padded group", "Exaone 4", "Llama 4", "LFM 2", "Granite 4")
"""Windows, without positions in the layers that are compressed, chunks, and states."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ALWAYS else pytest.mark.slow) for n in FAMILIES]
)
def test_family(name: str, tmp_path: Path) -> None:
    row = examine(name, tmp_path)
    if row.stock == "no":
        pytest.skip(row.problems[0])
    assert row.fine, row


@pytest.mark.parametrize("window", [None, 1, 5, 40, 500])
@pytest.mark.parametrize(("length", "count"), [(70, 70), (70, 1), (64, 16), (9, 3)])
def test_layers_beside_see_their_window(window: int | None, length: int, count: int) -> None:
    """Over blocks in any order, and what lies before the window is not read."""
    heads, group, size, block = 2, 2, 8, 16
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, heads, length, size, generator=generator)
    query = torch.randn(count, heads * group, size, generator=generator)
    distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance < (length if window is None else window))
    row = torch.tensor([3, 1, 7, 2, 5])
    # One layer between those of others.
    cache = torch.full((8, 3, heads, block, 2 * size), torch.nan)[:, 1]
    first = 0 if window is None else max(0, length - count - window + 1)
    for i in range(first // block * block, length):
        cache[row[i // block], :, i % block] = torch.cat([keys[:, i], values[:, i]], -1)
    wanted = scaled_dot_product_attention(
        query.transpose(0, 1), keys.repeat_interleave(group, 0),
        values.repeat_interleave(group, 0), attn_mask=seen,
    ).transpose(0, 1)  # fmt: skip
    found = attend(query, cache, row, length, window, size**-0.5)
    torch.testing.assert_close(found, wanted)
    # A cap that nothing reaches, and a sink that takes nothing; then one that takes half of all.
    same = attend(query, cache, row, length, window, size**-0.5, 1e4, torch.full((4,), -1e9))
    torch.testing.assert_close(same, wanted, rtol=1e-4, atol=1e-4)
    only = attend(query, cache, row, length, 1, 0.0, 0.0, torch.zeros(4))
    latest = values.repeat_interleave(group, 0).transpose(0, 1)[length - count :]
    torch.testing.assert_close(only, latest / 2)
