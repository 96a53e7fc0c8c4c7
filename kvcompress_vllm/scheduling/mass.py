# SPDX-License-Identifier: Apache-2.0
"""Mass budgets: keep the fewest blocks that hold a given share of the score mass.

How many that are is only known once the keys are scored. So a request's observation is scored
first; its loss curve comes back with the output of that step, and then the scheduler fixes C from
it, as exactly as from a ratio. Until then an expected ratio stands for the mass: a constant, and
once a request was scored its own. Only forecasts of admission expect what other requests came to.
"""

from __future__ import annotations

import math

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import EXPECTED_RATIO, HIGHEST_RATIO
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.scheduling.request import Tracked

LEAST_EXPECTED = 1.25
"""Expected ratio at least: with 1, nothing would ever be scored."""

STEP = 0.25
"""Expected ratios are multiples of it, so that sizes can be remembered."""


def mass_blocks(budget: RequestBudget, curve: LossCurve, covered: int, block_size: int) -> int:
    """Blocks C to keep of a request for its mass, within its lowest and highest ratio.

    Args:
        curve: of its candidates.
        covered: F of the compression.
    """
    assert budget.mass is not None
    fewest = budget.fewest_blocks(block_size, covered)
    if budget.most_ratio is not None:
        fewest = max(fewest, math.ceil(covered / budget.most_ratio))
    most = max(fewest, math.ceil(covered / budget.least_ratio))
    return min(curve.blocks[-1], max(fewest, min(most, curve.fewest_blocks(budget.mass))))


def decide(tracked: Tracked, curve: LossCurve) -> Packing:
    """The packing of a request's next compression, once the loss curve of its keys is known."""
    covered = tracked.sizes.covered(tracked.due_at)
    kept = mass_blocks(tracked.budget, curve, covered, tracked.sizes.limits.block_size)
    if tracked.due_at < tracked.prefill_end:
        kept = tracked.sizes.within_peak(covered, kept)
    return Packing(covered, kept)


def rounded_ratio(ratio: float) -> float:
    """A ratio as forecasts use it: no higher, so that no request seems larger than its budget."""
    return max(LEAST_EXPECTED, math.floor(ratio / STEP) * STEP)


class ExpectedRatio:
    """What mass budgets come to: a running mean of the shares kept, from 1 / 4 on.

    Args:
        config: its limits bound the mean.
    """

    WEIGHT = 0.1

    def __init__(self, config: KVCompressConfig) -> None:
        m = config.page_format.blocks_per_page
        low, high = config.min_ratio or 1.0, config.max_ratio or HIGHEST_RATIO * m
        self._share = 1 / min(high, max(low, EXPECTED_RATIO * m))

    @property
    def ratio(self) -> float:
        """Candidate blocks per kept block."""
        return rounded_ratio(1 / self._share)

    def learn(self, covered: int, kept: int) -> None:
        """Learn from a request that keeps C = ``kept`` of F = ``covered`` blocks."""
        self._share += self.WEIGHT * (kept / covered - self._share)
