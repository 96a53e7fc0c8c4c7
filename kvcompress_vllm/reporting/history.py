# SPDX-License-Identifier: Apache-2.0
"""The last minutes of the engines behind one front end, for the live page. No vLLM types."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvcompress_vllm.records.plan import TRIGGERS
from kvcompress_vllm.reporting.metrics import REFUSALS, Outcome, StepReport
from kvcompress_vllm.reporting.shared import Held

SECONDS = 600
"""How far back it reaches, at one sample per second."""
LAST_REQUESTS = 1000
"""Requests that can be looked up: the latest that were compressed."""
MOST_OUTCOMES = 16
"""Compressions that are told of each, the latest."""
WAITS = (*REFUSALS, "reserve", "shared")
"""Why requests wait: refused admission, no free blocks to pack into, another's context."""
_SUFFIX = re.compile(r"(-\d+)?(-[0-9a-f]{8})?")
"""What vLLM appends to the id that a response has: the number of the prompt, and chance."""


class Gauges(NamedTuple):
    """The state of an engine after a step; blocks of its pool, null block left out."""

    running: int = 0
    waiting: int = 0
    packed_requests: int = 0
    used_blocks: int = 0
    packed_blocks: int = 0
    """Of those in use, what packed requests hold, tails included."""
    saved_blocks: int = 0
    cached_blocks: int = 0
    """Known to the prefix cache, in use or free."""

    @classmethod
    def of(cls, report: StepReport) -> Gauges:
        """What a report says of it."""
        pool = report.occupancy
        return cls(
            pool.running,
            pool.waiting,
            report.packed_requests,
            pool.total_blocks - pool.free_blocks,
            pool.packed_blocks,
            report.saved_blocks,
            pool.cached_blocks,
        )


@dataclass
class Events:
    """What happened since the server started, or during one second."""

    compressions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TRIGGERS, 0))
    compressed_requests: int = 0
    candidate_blocks: int = 0
    kept_blocks: int = 0
    freed_blocks: int = 0
    waits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WAITS, 0))
    """Requests kept waiting by each reason, counted on every step."""

    def add(self, report: StepReport) -> None:
        """Count what a report tells."""
        for reason, count in report.refusals.items():
            self.waits[reason] += count
        self.waits["reserve"] += report.reserve_waits
        self.waits["shared"] += report.shared.waits
        for item in report.compressions:
            self.compressions[item.trigger] += 1
            self.compressed_requests += item.first
            self.candidate_blocks += item.candidates
            self.kept_blocks += item.kept
            self.freed_blocks += item.before - item.after

    def kept_ratio(self) -> float | None:
        """Blocks kept per candidate block; None if nothing was compressed."""
        return self.kept_blocks / self.candidate_blocks if self.candidate_blocks else None


COLUMNS = ("time", *Gauges._fields, *TRIGGERS, "kept_ratio", *WAITS)
"""Of a sample: end of the second in Unix time, state at that time, events during the second."""

Sample = tuple[float | None, ...]


class History:
    """One sample per second, of all engines together.

    Args:
        engines: indexes of the engines.
        now: Unix time in seconds, as in all methods.
    """

    def __init__(self, engines: Sequence[int], now: float) -> None:
        self.totals = Events()
        self._gauges = {engine: Gauges() for engine in engines}
        self._kept_pages: dict[int, tuple[list[list[int]], int]] = {}
        self._contexts: dict[int, list[Held]] = {}
        self._requests: dict[str, list[Outcome]] = {}
        self._second = math.floor(now)
        self._events = Events()
        self._samples: deque[Sample] = deque(maxlen=SECONDS)

    def record(self, engine: int, report: StepReport, now: float) -> None:
        """Take in the report of a step."""
        self._close(now)
        self._gauges[engine] = Gauges.of(report)
        self._kept_pages[engine] = report.kept_pages, report.measured_requests
        if report.shared.held is not None:
            self._contexts[engine] = report.shared.held
        self._events.add(report)
        self.totals.add(report)
        for outcome in report.outcomes:
            known = self._requests.pop(outcome.request_id, [])
            self._requests[outcome.request_id] = [*known[1 - MOST_OUTCOMES :], outcome]
        while len(self._requests) > LAST_REQUESTS:
            del self._requests[next(iter(self._requests))]

    @property
    def num_engines(self) -> int:
        return len(self._gauges)

    def gauges(self) -> Gauges:
        """The latest state, summed over the engines."""
        return Gauges(*map(sum, zip(*self._gauges.values(), strict=True)))

    def by_engine(self) -> dict[int, Gauges]:
        """The latest state of each engine."""
        return dict(self._gauges)

    def mean_kept_pages(self) -> list[list[float]]:
        """``[L, H]``, pages that each KV head keeps on average; empty where nothing is packed."""
        known = [(pages, requests) for pages, requests in self._kept_pages.values() if requests]
        total = sum(requests for _, requests in known)
        return [
            [sum(heads) / total for heads in zip(*layers, strict=True)]
            for layers in zip(*(pages for pages, _ in known), strict=True)
        ]

    def outcomes(self, wanted: str) -> dict[str, list[Outcome]]:
        """Of the requests with an id, or with the id of a response: its prompts, oldest first.

        Nobody can ask for more than the requests whose id is known.
        """
        return {
            name: list(found)
            for name, found in self._requests.items()
            if name.startswith(wanted) and _SUFFIX.fullmatch(name, len(wanted))
        }

    def contexts(self) -> list[Held]:
        """What requests could take, of all engines, most recently used first."""
        return [held for engine in self._contexts.values() for held in reversed(engine)]

    def told(self, since: float, now: float) -> dict[str, Any]:
        """What the page is told, JSON-serialisable.

        Args:
            since: samples of later seconds only.
        """
        return {
            "time": now,
            "engines": self.num_engines,
            "columns": COLUMNS,
            "samples": self.samples(since, now),
            "now": self.gauges()._asdict(),
            "by_engine": {n: gauges._asdict() for n, gauges in self.by_engine().items()},
            "totals": {**vars(self.totals), "kept_ratio": self.totals.kept_ratio()},
            "kept_pages": self.mean_kept_pages(),
            "contexts": [held._asdict() for held in self.contexts()],
        }

    def samples(self, since: float, now: float) -> list[Sample]:
        """Of the seconds that ended after ``since`` and are over, in the order of :data:`COLUMNS`.

        No report comes while an engine is idle: its state then is the one it reported last.
        """
        self._close(now)
        first = self._samples[0][0] if self._samples else None
        if first is None:
            return []
        skip = max(0, math.floor(since - first) + 1)
        return list(self._samples)[skip:]

    def _close(self, now: float) -> None:
        """Append the seconds that are over by ``now``."""
        second = math.floor(now)
        self._second = max(self._second, second - SECONDS)
        while self._second < second:
            self._second += 1
            events, self._events = self._events, Events()
            self._samples.append(
                (
                    self._second,
                    *self.gauges(),
                    *(events.compressions[trigger] for trigger in TRIGGERS),
                    events.kept_ratio(),
                    *(events.waits[reason] for reason in WAITS),
                )
            )
