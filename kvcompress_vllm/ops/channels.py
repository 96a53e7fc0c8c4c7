# SPDX-License-Identifier: Apache-2.0
"""What is known of a key: the channels of the statistics ops, and stored scores. Loads nothing.

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
    "MAXIMUM",
    "NORM",
    "LIKENESS",
    "VALUE_NORM",
    "ECHO",
)
"""Names of what is known of a key, in one numbering: channel c is bit ``1 << c`` of a mask. Up to
MAXIMUM they are channels of ``ops.attention_statistics``, NORM, LIKENESS and VALUE_NORM of
``ops.key_statistics``; ECHO is what ``ops.echo_scores`` stored when the key was computed."""
SUM, SUM_SQUARES, HEAD_SUM_SQUARES, LOW_COUNT, MEAN_SQUARES, ENTROPY, LAST, MAXIMUM = range(8)
NORM, LIKENESS, VALUE_NORM, ECHO = 8, 9, 10, 11

ATTENTION_CHANNELS = (1 << NORM) - 1
"""Mask of all channels of ``ops.attention_statistics``."""
KEY_CHANNELS = 1 << NORM | 1 << LIKENESS | 1 << VALUE_NORM
"""Mask of all channels of ``ops.key_statistics``."""
STORED_CHANNELS = 1 << ECHO
"""Mask of all channels that no statistics op computes."""


def channel_mask(channels: Iterable[int]) -> int:
    """These channels as a mask. Each op takes its part, ``& ATTENTION_CHANNELS`` or ``&
    KEY_CHANNELS``."""
    return sum(1 << channel for channel in set(channels))
