# SPDX-License-Identifier: Apache-2.0
"""How sure a measured share is."""

from __future__ import annotations

import math


def interval(right: int, samples: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval of a share."""
    if not samples:
        return 0.0, 1.0
    z = 1.96
    share, spread = right / samples, z * z / samples
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / samples + spread / (4 * samples)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
