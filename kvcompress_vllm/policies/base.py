# SPDX-License-Identifier: Apache-2.0
"""What a policy is. Letters as in ``kvcompress_vllm/layout.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Policy(ABC):
    """Scores the candidate keys of one request from what its last queries paid to them."""

    channels: tuple[int, ...]
    """Channels of the statistics op that ``score`` takes, ascending."""

    def __init__(self, pool: int) -> None:
        self.pool = pool

    @abstractmethod
    def score(self, statistics: Tensor) -> Tensor:
        """Score every key.

        Args:
            statistics: ``[channels, L * H, n]`` fp32 of one request, all heads with the same n
                candidate keys in token order.

        Returns:
            ``[L * H, n]`` fp32; higher means keep.
        """
