# SPDX-License-Identifier: Apache-2.0
"""Reports of compressions that the device may not have finished."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from kvcompress_vllm.cache.transfer import Stopwatch, to_host
from kvcompress_vllm.compression.failures import Failures
from kvcompress_vllm.records.curve import LossCurve
from kvcompress_vllm.records.plan import Compression, Judged
from kvcompress_vllm.records.report import Report, Scored


class PendingLengths(NamedTuple):
    """How long the heads of a packed request are, once the device has come so far."""

    kept_pages: Tensor
    """``[L, H]`` int32 on the host, or on its way there."""
    watch: Stopwatch

    def longest(self) -> int | None:
        """Most pages that a head keeps; None: not yet known."""
        return int(self.kept_pages.max()) if self.watch.done() else None


class PendingReports:
    """Reports of compressions that the device may not have finished; host copies are under way.

    Args:
        due: what was compressed together.
        points: block counts of each curve, ascending.
        lost: ``[sum of points]`` share lost at each.
        kept_pages: ``[R, L, H]`` int32; None: they were only scored.
        watch: started before the first kernel; stopped here.
        failures: what their policy did wrong.
    """

    def __init__(
        self,
        due: Sequence[Judged],
        points: list[list[int]],
        lost: Tensor,
        kept_pages: Tensor | None,
        watch: Stopwatch,
        failures: Failures,
    ) -> None:
        self._failures, self._flags = failures, to_host(failures.flags(lost.device))
        self._due, self._points, self._watch = due, points, watch
        self._lost = to_host(lost)
        self._kept_pages = None if kept_pages is None else to_host(kept_pages)
        watch.stop()

    def lengths(self) -> list[PendingLengths]:
        """How long the heads of each request are afterwards, in the order of ``due``."""
        kept_pages = () if self._kept_pages is None else self._kept_pages
        return [PendingLengths(of_request, self._watch) for of_request in kept_pages]

    def collect(self) -> list[Report | Scored]:
        """Wait until the device is done, and read the reports. From any thread."""
        milliseconds = self._watch.milliseconds()
        lost = iter(self._lost.tolist())
        curves = [LossCurve(points, list(islice(lost, len(points)))) for points in self._points]
        failures = self._failures.messages(self._flags.tolist())
        items = list(zip(self._due, curves, failures, strict=True))
        if self._kept_pages is None:
            return [
                Scored(item.request_id, item.state_slot, item.num_tokens, curve, failure)
                for item, curve, failure in items
            ]
        blocks = sum(item.candidate_blocks for item in self._due)
        return [
            Report(
                item.request_id,
                item.state_slot,
                item.num_tokens,
                item.trigger,
                kept,
                curve.lost_at(item.kept),
                milliseconds * item.candidate_blocks / blocks,
                curve,
                failure,
            )
            for (item, curve, failure), kept in zip(items, self._kept_pages.tolist(), strict=True)
            if isinstance(item, Compression)
        ]
