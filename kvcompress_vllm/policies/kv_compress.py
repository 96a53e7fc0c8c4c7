# SPDX-License-Identifier: Apache-2.0
"""KV-Compress (arXiv 2410.00161): total squared attention of the last queries, max-pooled.

Equations 9 to 11 and 19: ``M[l, h, j]`` is the sum of the squared attention probabilities that the
last ``window`` prompt queries of all group members pay to key j (L2 aggregation, summed over the
query group); equation 8 takes the maximum over neighbouring keys, so that a token is kept together
with its context. The group is summed first and pooled after, as the paper's equations have it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import max_pool1d

from kvcompress_vllm import ops
from kvcompress_vllm.policies.base import Policy


class KVCompress(Policy):
    """Sum of squared attention over window and group, max-pooled over ``pool`` keys."""

    channels = (ops.SUM_SQUARES,)

    def score(self, statistics: Tensor) -> Tensor:
        squares = statistics[0]
        if self.pool == 1:
            return squares
        return max_pool1d(squares, self.pool, stride=1, padding=self.pool // 2)
