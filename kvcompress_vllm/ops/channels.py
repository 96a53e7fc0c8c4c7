# SPDX-License-Identifier: Apache-2.0
"""What is known of a key: the channels of the two statistics ops. Loads nothing.

Their formulas are in :mod:`kvcompress_vllm.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Iterable

CHANNELS = (
    "SUM",
    "SUM_SQUARES",
    "HEAD_SUM_SQUARES",
    "LOW_COUNT",
    "MEAN_SQUARES",
    "ENTROPY",
    "LAST",
    "NORM",
    "LIKENESS",
)
"""Names of what is known of a key, in one numbering: channel c is bit ``1 << c`` of a mask. Up to
LAST they are channels of ``ops.attention_statistics``, from NORM on of ``ops.key_statistics``."""
SUM, SUM_SQUARES, HEAD_SUM_SQUARES, LOW_COUNT, MEAN_SQUARES, ENTROPY, LAST = range(7)
NORM, LIKENESS = 7, 8

ATTENTION_CHANNELS = (1 << NORM) - 1
"""Mask of all channels of ``ops.attention_statistics``."""
KEY_CHANNELS = 1 << NORM | 1 << LIKENESS
"""Mask of all channels of ``ops.key_statistics``."""


def channel_mask(channels: Iterable[int]) -> int:
    """These channels as a mask. Each op takes its part, ``& ATTENTION_CHANNELS`` or ``&
    KEY_CHANNELS``."""
    return sum(1 << channel for channel in set(channels))
