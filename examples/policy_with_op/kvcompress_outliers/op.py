# SPDX-License-Identifier: Apache-2.0
"""The op: its schema, what it computes (in PyTorch, on every device), its kernel for the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def reference(vectors: Tensor, radius: int) -> Tensor:
    """Squared distance of each vector to the mean of itself and its neighbours in the sequence.

    Args:
        vectors: ``[H, n, D]`` fp32, contiguous.
        radius: how far neighbours are away, at least 0.

    Returns:
        ``[H, n]`` fp32.
    """
    n = vectors.shape[1]
    sums = torch.nn.functional.pad(vectors.double().cumsum(1), (0, 0, 1, 0))
    key = torch.arange(n, device=vectors.device)
    first, end = (key - radius).clamp(min=0), (key + radius + 1).clamp(max=n)
    mean = (sums[:, end] - sums[:, first]) / (end - first)[:, None]
    return (vectors - mean).square().sum(-1).float()


_LIB = torch.library.Library("kvcompress_outliers", "DEF")
_LIB.define("distances(Tensor vectors, int radius) -> Tensor")
_LIB.impl("distances", reference, "CompositeExplicitAutograd")
for _library in Path(__file__).parent.glob("_C.*so"):
    torch.ops.load_library(str(_library))  # PyTorch then prefers its kernel on the CPU

distances = torch.ops.kvcompress_outliers.distances
