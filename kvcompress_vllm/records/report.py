# SPDX-License-Identifier: Apache-2.0
"""What a worker tells the scheduler about the compressions of a step. Picklable."""

from __future__ import annotations

from typing import NamedTuple

from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.plan import Trigger


class Report(NamedTuple):
    """One compression as it was carried out on one rank."""

    request_id: str
    state_slot: int
    num_tokens: int
    """Tokens whose full blocks competed; with request and slot, this names a compression."""
    trigger: Trigger
    kept_pages: list[list[int]]
    """``[L, H]``, pages that each KV head of the rank keeps; L of all pipeline stages."""
    lost: float
    """Share of the score mass that went; see :mod:`kvcompress_vllm.compression.loss`."""
    milliseconds: float
    """Of the rank's stream. Requests that were compressed together share it by their blocks."""
    curve: LossCurve
    failure: str | None = None
    """What the policy did wrong; then the request kept its latest keys, and must not go on."""


class Scored(NamedTuple):
    """The loss curve of a request that awaits its compression; fields as in :class:`Report`."""

    request_id: str
    state_slot: int
    num_tokens: int
    curve: LossCurve
    failure: str | None = None
