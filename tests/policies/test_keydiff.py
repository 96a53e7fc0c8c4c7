# SPDX-License-Identifier: Apache-2.0
"""KeyDiff's score in the dtypes of the cache. What it keeps: test_parity.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.keydiff import unlikeness


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("count", "absent"), [(96, 0), (96, 40), (70_000, 0)])
def test_cosines_to_the_mean_direction(dtype: torch.dtype, count: int, absent: int) -> None:
    """With absent keys, which are zeros; and with more keys of one direction than fp16 counts."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, count, 8, generator=generator)
    keys[..., 0] += 40
    keys[:, :absent] = 0
    keys = keys.to(dtype)
    evidence = Evidence(
        layers=1, heads=2, group=1, num_keys=count, num_kept=count, seq_len=count, num_queries=1,
        num_sinks=0, num_recent=0, scale=1.0, device=keys.device, keys=lambda layer: keys,
    )  # fmt: skip
    exact = keys.double()
    mean = normalize(exact, dim=-1).sum(1, keepdim=True)
    expected = -cosine_similarity(exact, mean, dim=-1)
    torch.testing.assert_close(unlikeness(evidence).double(), expected, rtol=0, atol=1e-2)
