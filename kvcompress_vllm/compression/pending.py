# SPDX-License-Identifier: Apache-2.0
"""Reports of compressions that the device may not have finished.

Under pipeline parallelism every stage compresses its own layers, and vLLM hears the last stage
only. So each hands its numbers to the next (:meth:`PendingReports.parcel`), which joins them with
its own; the last one's reports are then of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
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


class Numbers(NamedTuple):
    """What the device finds out about requests that were compressed together."""

    lost: Tensor
    """``[sum of points]`` fp64, share of the score mass lost at each point of each curve."""
    flags: Tensor
    """``[R]`` int32, 1 where the policy failed."""
    kept_pages: Tensor
    """``[R, L, H]`` int32; ``[0, L, H]`` where they were only scored."""

    def flat(self) -> Tensor:
        """One after the other, ``[n]`` fp64."""
        return torch.cat([numbers.flatten().double() for numbers in self])

    def split(self, flat: Tensor, layers: int) -> Numbers:
        """What :meth:`flat` of a rank with ``layers`` layers was made of."""
        lost, flags, kept_pages = self
        shape = (kept_pages.shape[0], layers, kept_pages.shape[2])
        ends = [lost.numel(), lost.numel() + flags.numel()]
        parts = flat.tensor_split(ends)
        return Numbers(parts[0], parts[1].int(), parts[2].int().view(shape))

    def on_host(self) -> Numbers:
        """On its way there."""
        return Numbers(*map(to_host, self))


class Parcel(NamedTuple):
    """What one pipeline stage tells the next about requests that were compressed together."""

    numbers: Tensor
    """:meth:`Numbers.flat`, on the device."""
    messages: list[str | None]
    """By request, what is known to be wrong."""
    layers: int
    """Whose numbers these are: the first so many of the model."""


class PendingReports:
    """Reports of compressions that the device may not have finished; host copies are under way.

    Args:
        due: what was compressed together.
        points: block counts of each curve, ascending.
        lost: ``[sum of points]`` share lost at each.
        kept_pages: ``[R, L, H]`` int32; ``[0, L, H]`` where they were only scored.
        watch: started before the first kernel; stopped here.
        failures: what their policy did wrong.
    """

    def __init__(
        self,
        due: Sequence[Judged],
        points: list[list[int]],
        lost: Tensor,
        kept_pages: Tensor,
        watch: Stopwatch,
        failures: Failures,
    ) -> None:
        self._numbers = Numbers(lost, failures.flags(lost.device), kept_pages)
        self._due, self._points, self._watch, self._failures = due, points, watch, failures
        self._on_host = self._numbers.on_host()
        watch.stop()
        self._arrival: Stopwatch | None = None

    @property
    def joined(self) -> bool:
        """Whether the stages before have been heard."""
        return self._arrival is not None

    @property
    def _layers(self) -> int:
        return self._numbers.kept_pages.shape[1]

    def lengths(self) -> list[PendingLengths]:
        """How long the heads of each request are afterwards, in the order of ``due``; of this rank,
        so to be asked before :meth:`join`."""
        return [PendingLengths(of_request, self._watch) for of_request in self._on_host.kept_pages]

    def parcel(self) -> Parcel:
        """What the next pipeline stage is told. Waits for nothing."""
        return Parcel(self._numbers.flat(), self._failures.known, self._layers)

    def join(self, earlier: Parcel) -> None:
        """Report of the layers of earlier pipeline stages, too. Waits for nothing.

        The share of the mass that all layers lose is the mean of what each stage's do, by their
        number of layers: what queries pay sums to the same in every layer.
        """
        own, theirs = self._numbers, self._numbers.split(earlier.numbers, earlier.layers)
        weight = earlier.layers / (earlier.layers + self._layers)
        self._numbers = Numbers(
            weight * theirs.lost + (1 - weight) * own.lost,
            torch.maximum(theirs.flags, own.flags),
            torch.cat([theirs.kept_pages, own.kept_pages], 1),
        )
        self._failures.join(earlier.messages)
        self._arrival = Stopwatch(own.lost.device)
        self._on_host = self._numbers.on_host()
        self._arrival.stop()

    def collect(self) -> list[Report | Scored]:
        """Wait until the device is done, and read the reports. From any thread."""
        milliseconds = self._watch.milliseconds()
        if self._arrival is not None:
            self._arrival.milliseconds()
        lost = iter(self._on_host.lost.tolist())
        curves = [LossCurve(points, list(islice(lost, len(points)))) for points in self._points]
        failures = self._failures.messages(self._on_host.flags.tolist())
        items = list(zip(self._due, curves, failures, strict=True))
        kept_pages = self._on_host.kept_pages.tolist()
        if not kept_pages:
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
            for (item, curve, failure), kept in zip(items, kept_pages, strict=True)
            if isinstance(item, Compression)
        ]
