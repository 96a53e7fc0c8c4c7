# SPDX-License-Identifier: Apache-2.0
"""What operators can see of compression: the metrics, and what a step reports towards them.

The scheduler records; :class:`StepReport` travels to the front end with vLLM's own statistics;
``integration/frontend/prometheus.py`` turns it into the metrics of :data:`METRICS`. No vLLM types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvcompress_vllm.records.plan import TRIGGERS, Compression
from kvcompress_vllm.records.report import Report
from kvcompress_vllm.reporting.shared import SharedReport

REFUSALS = ("forecast", "slots")
"""Why a waiting request is kept out although vLLM would admit it."""
PACKED = ("no", "yes")
"""Whether a request was packed when its drafted tokens were verified."""


class Metric(NamedTuple):
    """One metric as Prometheus sees it; all carry vLLM's labels ``model_name`` and ``engine``.

    Attributes:
        name: with the ``_total`` of counters.
        kind: Prometheus type.
        help: one sentence.
        label: one more label, and ``values`` all that it can be.
        buckets: upper bounds of a histogram's.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str | None = None
    values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


COMPRESSED_REQUESTS = "kv_compress:compressed_requests_total"
COMPRESSIONS = "kv_compress:compressions_total"
KEPT_RATIO = "kv_compress:kept_ratio"
COMPRESSION_SECONDS = "kv_compress:compression_seconds"
SCORE_MASS_LOST = "kv_compress:score_mass_lost"
FREED_BLOCKS = "kv_compress:freed_blocks_total"
BLOCKS_BEFORE = "kv_compress:blocks_before_total"
BLOCKS_AFTER = "kv_compress:blocks_after_total"
BYTES_BEFORE = "kv_compress:bytes_before_total"
BYTES_AFTER = "kv_compress:bytes_after_total"
RESERVE_WAITS = "kv_compress:reserve_waits_total"
ADMISSION_REFUSALS = "kv_compress:admission_refusals_total"
PREEMPTIONS = "kv_compress:preemptions_total"
PREEMPTIONS_AVOIDED = "kv_compress:preemptions_avoided_total"
PACKED_REQUESTS = "kv_compress:packed_requests"
SAVED_BLOCKS = "kv_compress:saved_blocks"
OBSERVATION_SLOTS_USED = "kv_compress:observation_slots_used"
OBSERVATION_SLOTS = "kv_compress:observation_slots"
DRAFT_TOKENS = "kv_compress:draft_tokens_total"
ACCEPTED_TOKENS = "kv_compress:accepted_tokens_total"
SHARED_HITS = "kv_compress:shared_hits_total"
SHARED_MISSES = "kv_compress:shared_misses_total"
SHARED_TOKENS = "kv_compress:shared_tokens_total"
SHARED_WAITS = "kv_compress:shared_waits_total"
SHARED_CONTEXTS = "kv_compress:shared_contexts"
SHARED_BLOCKS = "kv_compress:shared_blocks"
SHARED_SAVED_BLOCKS = "kv_compress:shared_saved_blocks"

_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SECONDS = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_SHARES = (1e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)

METRICS = (
    Metric(COMPRESSED_REQUESTS, "counter", "Requests compressed at least once."),
    Metric(COMPRESSIONS, "counter", "Compressions carried out, by what called for them.",
           "trigger", TRIGGERS),
    Metric(KEPT_RATIO, "histogram", "Kept blocks per candidate block of each compression.",
           "trigger", TRIGGERS, _RATIOS),
    Metric(COMPRESSION_SECONDS, "histogram",
           "Time that each compression took of the first rank's device, or of the host on CPU.",
           "trigger", TRIGGERS, _SECONDS),
    Metric(SCORE_MASS_LOST, "histogram", "Share of the score mass that each compression dropped.",
           "trigger", TRIGGERS, _SHARES),
    Metric(FREED_BLOCKS, "counter", "Blocks that compressions gave back, net of the packed ones."),
    Metric(BLOCKS_BEFORE, "counter", "Blocks that compressed requests held before, summed."),
    Metric(BLOCKS_AFTER, "counter", "Blocks that compressed requests held afterwards, summed."),
    Metric(BYTES_BEFORE, "counter",
           "KV cache that compressed requests held before, in bytes of all ranks, summed."),
    Metric(BYTES_AFTER, "counter",
           "KV cache that compressed requests held afterwards, in bytes of all ranks, summed."),
    Metric(RESERVE_WAITS, "counter",
           "Steps on which a due compression waited for free blocks to pack into."),
    Metric(ADMISSION_REFUSALS, "counter",
           "Steps on which a waiting request was kept out: by the forecast of what all requests "
           "will hold, or for want of slots.", "reason", REFUSALS),
    Metric(PREEMPTIONS, "counter", "Requests that vLLM preempted."),
    Metric(PREEMPTIONS_AVOIDED, "counter",
           "Requests that vLLM would have preempted, had no compression under pressure freed "
           "their blocks (estimate)."),
    Metric(PACKED_REQUESTS, "gauge", "Requests that are packed now."),
    Metric(SAVED_BLOCKS, "gauge", "Blocks that packed requests would hold in addition if kept."),
    Metric(OBSERVATION_SLOTS_USED, "gauge", "Observation slots in use."),
    Metric(OBSERVATION_SLOTS, "gauge", "Observation slots of the engine."),
    Metric(DRAFT_TOKENS, "counter",
           "Drafted tokens that were verified, of requests that were packed and of others.",
           "packed", PACKED),
    Metric(ACCEPTED_TOKENS, "counter", "Those of them that were accepted.", "packed", PACKED),
    Metric(SHARED_HITS, "counter",
           "Requests that took a packed context instead of computing it."),
    Metric(SHARED_MISSES, "counter", "Requests that computed a context which others can take."),
    Metric(SHARED_TOKENS, "counter", "Prompt tokens that were not computed for that."),
    Metric(SHARED_WAITS, "counter",
           "Requests that waited for another to compute their context, counted on every step."),
    Metric(SHARED_CONTEXTS, "gauge", "Packed contexts that a request could take now."),
    Metric(SHARED_BLOCKS, "gauge", "Packed blocks of those, in use or free."),
    Metric(SHARED_SAVED_BLOCKS, "gauge",
           "Blocks that requests would hold in addition, had each its own copy of its context."),
)  # fmt: skip


class Compressed(NamedTuple):
    """One compression, in blocks. ``first``: of its request."""

    trigger: str
    first: bool
    candidates: int
    kept: int
    before: int
    after: int


class Measured(NamedTuple):
    """What a worker measured of one compression; see ``records/report.py``."""

    trigger: str
    milliseconds: float
    lost: float


class Outcome(NamedTuple):
    """What a compression did to a request, for who looks that one up."""

    request_id: str
    trigger: str
    num_tokens: int
    """That had been computed."""
    before: int
    """Blocks that it held."""
    after: int
    lost: float
    """Share of the score mass."""
    milliseconds: float
    layers: list[int]
    """``[L]``, packed pages that the heads of each layer keep together; under tensor parallelism
    those of the first rank. ``heads`` times ``covered`` were candidates."""
    heads: int
    covered: int
    """Blocks' worth of tokens that it was about."""


class Occupancy(NamedTuple):
    """vLLM's pool and queues after a step."""

    total_blocks: int = 0
    """Without the null block."""
    free_blocks: int = 0
    """Those included that only the prefix cache holds."""
    running: int = 0
    waiting: int = 0
    """Requests; preempted ones included."""
    packed_blocks: int = 0
    """Blocks that packed requests hold, their tails included."""
    cached_blocks: int = 0
    """Blocks that the prefix cache knows, in use or free."""


@dataclass
class StepReport:
    """Events since the report before, and the state now; decoded by the types declared here."""

    compressions: list[Compressed] = field(default_factory=list)
    reserve_waits: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    """By one of :data:`REFUSALS`."""
    packed_requests: int = 0
    saved_blocks: int = 0
    observation_slots_used: int = 0
    observation_slots: int = 0
    measured: list[Measured] = field(default_factory=list)
    """Of compressions of this step or, under asynchronous scheduling, of the one before."""
    kept_pages: list[list[int]] = field(default_factory=list)
    """``[L, H]``, pages that each KV head keeps, summed over ``measured_requests``; empty as long
    as there are none. Without the tail; under tensor parallelism the heads of the first rank."""
    measured_requests: int = 0
    """Packed requests whose kept pages are known: all, but those of the latest steps."""
    occupancy: Occupancy = field(default_factory=Occupancy)
    preemptions: int = 0
    preemptions_avoided: int = 0
    block_bytes: int = 0
    """Of a block, over all layers and ranks."""
    shared: SharedReport = field(default_factory=SharedReport)
    outcomes: list[Outcome] = field(default_factory=list)
    """Of the compressions that are ``measured``."""
    drafted: list[int] = field(default_factory=lambda: [0, 0])
    accepted: list[int] = field(default_factory=lambda: [0, 0])
    """Drafted tokens that were verified, and accepted, in the order of :data:`PACKED`."""

    def mean_kept_pages(self) -> list[list[float]]:
        """``[L, H]``, pages that each KV head keeps of a packed request on average."""
        return [[pages / self.measured_requests for pages in layer] for layer in self.kept_pages]


class Recorder:
    """Collects one engine's events between two reports.

    Args:
        enabled: False records nothing: where vLLM keeps no statistics, nobody takes reports.
        block_bytes: of a block, over all layers and ranks.
    """

    def __init__(self, enabled: bool = True, block_bytes: int = 0) -> None:
        self.enabled, self._block_bytes = enabled, block_bytes
        self._report = StepReport()
        self._known: set[str] = set()
        self._kept_pages: dict[str, NDArray[np.int64]] = {}
        self._sizes: dict[str, tuple[int, int, int]] = {}
        """Of compressions that are not measured yet: blocks before and after, and F."""
        self._sum: NDArray[np.int64] = np.zeros((), np.int64)
        """``[L, H]`` of them all, once there was one."""
        self._told: list[list[int]] | None = []

    def compressed(self, item: Compression) -> None:
        """Note a compression that the workers will carry out."""
        if not self.enabled:
            return
        row = len(item.old_blocks)
        self._sizes[item.request_id] = (
            item.old_packing.held(row),
            item.packing.held(row),
            item.packing.covered,
        )
        self._report.compressions.append(
            Compressed(
                item.trigger,
                item.request_id not in self._known,
                item.candidate_blocks,
                item.kept,
                item.old_packing.held(row),
                item.packing.held(row),
            )
        )
        self._known.add(item.request_id)

    def reserve_wait(self) -> None:
        """Note that a due compression found too few free blocks on this step."""
        self._report.reserve_waits += 1

    def refused(self, reason: str) -> None:
        """Note that a waiting request was kept out on this step, by one of :data:`REFUSALS`."""
        self._report.refusals[reason] = self._report.refusals.get(reason, 0) + 1

    def stepped(self, preempted: int, avoided: int) -> None:
        """Note what a step had to preempt, and what it would have had to; see ``shortage.py``."""
        self._report.preemptions += preempted
        self._report.preemptions_avoided += avoided

    def verified(self, packed: bool, drafted: int, accepted: int) -> None:
        """Note what a step made of the drafted tokens of one request."""
        self._report.drafted[packed] += drafted
        self._report.accepted[packed] += accepted

    def measured(self, report: Report, current: bool) -> None:
        """Note what the output rank reports of a compression.

        Args:
            current: whether the request is still packed so.
        """
        if not self.enabled:
            return
        self._report.measured.append(Measured(report.trigger, report.milliseconds, report.lost))
        sizes = self._sizes.pop(report.request_id, None)
        if sizes is not None and report.kept_pages:
            before, after, covered = sizes
            self._report.outcomes.append(
                Outcome(
                    report.request_id,
                    report.trigger,
                    report.num_tokens,
                    before,
                    after,
                    report.lost,
                    report.milliseconds,
                    [sum(heads) for heads in report.kept_pages],
                    len(report.kept_pages[0]),
                    covered,
                )
            )
        if current:
            self._replace(report.request_id, np.array(report.kept_pages))

    def released(self, request_id: str) -> None:
        """Note that a request gave its blocks up."""
        self._replace(request_id, None)

    def _replace(self, request_id: str, pages: NDArray[np.int64] | None) -> None:
        """Note the kept pages of a request, or that it has none."""
        old = self._kept_pages.pop(request_id, None)
        if old is not None:
            self._sum, self._told = self._sum - old, None
        if pages is not None:
            self._sum, self._told = self._sum + pages, None
            self._kept_pages[request_id] = pages

    def finished(self, request_id: str) -> None:
        """Forget a request. A preempted one stays known: it may be compressed a second time."""
        self._known.discard(request_id)
        self._sizes.pop(request_id, None)

    def take(
        self,
        packed: Mapping[str, tuple[int, int]],
        slots_used: int,
        slots: int,
        occupancy: Occupancy | None = None,
        shared: SharedReport | None = None,
    ) -> StepReport:
        """The events since the last call, with the state now.

        Args:
            packed: (F, C) of every packed request.
            slots_used: observation slots in use.
            slots: observation slots of the engine.
            occupancy: of the pool and the queues.
            shared: what requests shared.
        """
        report, self._report = self._report, StepReport()
        report.packed_requests = len(packed)
        report.saved_blocks = sum([covered - kept for covered, kept in packed.values()])
        report.observation_slots_used, report.observation_slots = slots_used, slots
        report.occupancy, report.block_bytes = occupancy or Occupancy(), self._block_bytes
        report.shared = shared or SharedReport()
        if self._told is None:
            self._told = self._sum.tolist() if self._kept_pages else []
        report.kept_pages, report.measured_requests = self._told, len(self._kept_pages)
        return report
