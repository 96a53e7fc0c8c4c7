# SPDX-License-Identifier: Apache-2.0
"""The kernel against its reference, and the policy's scores. Without an engine."""

import pytest
import torch
from kvcompress_outliers import op

from kvcompress_vllm import KVCompressConfig
from kvcompress_vllm.policies.trial import check


@pytest.mark.parametrize("shape", [(2, 40, 8), (1, 1, 4), (3, 5, 16)])
@pytest.mark.parametrize("radius", [0, 2, 8])
def test_the_kernel_does_what_the_reference_says(shape, radius):
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(op.distances(vectors, radius), op.reference(vectors, radius))


def test_the_kernel_is_used():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("kvcompress_outliers::distances", "CPU")


def test_scores_are_accepted():
    """Shapes, types and finite numbers on made-up keys: what the engine checks before it starts."""
    check("outliers", KVCompressConfig.from_dict({"policy": "outliers"}))
