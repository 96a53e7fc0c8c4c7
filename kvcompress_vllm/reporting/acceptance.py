# SPDX-License-Identifier: Apache-2.0
"""Whether what is drafted is accepted less often of packed requests. No vLLM types.

Compression never changes what a draft is verified against, but it may change how well it is
guessed: a draft model keeps the first keys and the latest of what it has read. What is accepted of
requests that are not packed, in the same engine, is what to compare with. vLLM's own metrics
(``vllm:spec_decode_*``) have both together.
"""

from __future__ import annotations

from collections.abc import Callable

ENOUGH = 1000
"""Drafted tokens on either side before they are compared."""
FALLS = 0.8
"""Below so much of the acceptance of others it is worth a warning."""
REMEDY = (
    "a lower ratio, or a larger recent, lets the draft model see more; fewer speculative tokens "
    "waste less"
)


def falls(other: tuple[float, float], own: tuple[float, float]) -> bool:
    """Whether clearly less is accepted of packed requests than of others; False as long as little
    is known.

    Args:
        other: accepted and drafted tokens of requests that are not packed.
        own: of packed ones.
    """
    if min(other[1], own[1]) < ENOUGH:
        return False
    return own[0] / own[1] < FALLS * other[0] / other[1]


class Acceptance:
    """Counts what is verified, and warns once.

    Args:
        warn: told in a sentence.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._drafted, self._accepted = [0, 0], [0, 0]
        self._warned = False

    def verified(self, packed: bool, drafted: int, accepted: int) -> None:
        """Note what a step made of the drafted tokens of one request."""
        self._drafted[packed] += drafted
        self._accepted[packed] += accepted
        if self._warned or not falls(*zip(self._accepted, self._drafted, strict=True)):
            return
        self._warned = True
        other, own = (a / d for a, d in zip(self._accepted, self._drafted, strict=True))
        self._warn(
            f"{own:.0%} of {self._drafted[True]} drafted tokens of packed requests are accepted, "
            f"and {other:.0%} of {self._drafted[False]} of others: {REMEDY}"
        )
