# SPDX-License-Identifier: Apache-2.0
"""Compression of the due requests of a step: statistics, score, allocate, select, compact.

Letters as in ``cache/layout.py``. Runs before the step's forward, on its stream. The scheduler has
fixed how many blocks each request keeps; this decides which keys they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.cache.transfer import Stopwatch, to_device
from kvcompress_vllm.compression import allocation, batch, drafts, loss, statistics
from kvcompress_vllm.compression.batch import Batch, Rank
from kvcompress_vllm.compression.evidence import Rectangle, evidence_of
from kvcompress_vllm.compression.failures import Agree, Failures
from kvcompress_vllm.compression.pending import PendingLengths, PendingReports
from kvcompress_vllm.compression.protection import Protected
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.policies import judge
from kvcompress_vllm.policies.base import Evidence, Policy
from kvcompress_vllm.policies.judge import PolicyError, Shares
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Accumulation, Compression, Judged


class Verdict(NamedTuple):
    """What the policy wants of one request."""

    scores: Tensor
    """``[L * H, n]`` fp32, +inf where a range is protected."""
    freed: Tensor
    """``[1 + P, A]`` int32, rows of the selection op's ``num_freed``: of its C, and of the points
    of its curve."""
    lost: Tensor
    """``[P]`` fp64, share of the score mass that is lost at each point of its curve."""


class Selection(NamedTuple):
    """What the selection op chose for some requests of a batch."""

    which: list[int]
    """Their places in the batch."""
    part: Batch[Compression]
    chosen: drafts.Kept
    """By the scores."""
    kept: drafts.Kept
    """With what draft layers keep."""


class Compressor:
    """Carries out compressions of one cache group on one rank.

    Args:
        config: the resolved options.
        state: this rank's tables, changed by :meth:`run`.
        pages: ``[P, B, 2 * D]``, changed by :meth:`run`.
        agree: tells all ranks what went wrong on one; None: there is one rank.
        longest: tokens of the longest request, for which scratch is set aside.
    """

    def __init__(
        self,
        config: KVCompressConfig,
        state: PackedState,
        pages: Tensor,
        agree: Agree | None = None,
        longest: int = 0,
    ) -> None:
        self._configured = config
        self.rank = Rank(state, pages)
        self._agree = agree
        self._longest = longest
        self._policies: dict[str | None, tuple[KVCompressConfig, Policy]] = {}
        self._protected = Protected(state)
        self._lengths: dict[int, PendingLengths] = {}
        """By state slot, since its latest compression."""
        self.record: dict[str, list[Tensor]] | None = None
        """For tests, when not None: by request id, the kept key indices of every (layer, head)
        but those of draft layers."""

    @property
    def state(self) -> PackedState:
        return self.rank.state

    @property
    def group(self) -> CacheGroup:
        return self.rank.group

    @property
    def pages(self) -> Tensor:
        return self.rank.pages

    @property
    def device(self) -> torch.device:
        return self.rank.pages.device

    @property
    def policy(self) -> Policy:
        """The configured one."""
        return self._use(None)[1]

    def run(self, due: Sequence[Judged], score_only: bool = False) -> list[PendingReports]:
        """Compress every due request and describe it in the state tables.

        Args:
            score_only: change nothing; only the loss curves are wanted.

        Returns:
            What there is to report, once the device has done it.
        """

        def kind(item: Judged) -> tuple[str | None, int | None, int]:
            return item.policy, item.floor_pages, item.observed.stride if item.observed else 0

        pending = []
        for policy, floor, stride in dict.fromkeys(map(kind, due)):
            alike = [item for item in due if kind(item) == (policy, floor, stride)]
            for items in batch.batches(alike, self.rank, self._longest):
                together = Batch.of(items, *self._use(policy), self.rank, floor)
                pending.append(self._run(together, score_only))
        return pending

    def accumulate(self, chunks: Sequence[Accumulation]) -> None:
        """Add what was observed to the accumulated statistics."""
        for item in chunks:
            alone = Batch.of([item], *self._use(item.policy), self.rank)
            mask = ops.channel_mask(alone.policy.channels) & ops.ATTENTION_CHANNELS
            found = statistics.measure(self.rank, alone, mask)
            statistics.add_up(self.rank, item, alone.rows[0], found)

    def _use(self, name: str | None) -> tuple[KVCompressConfig, Policy]:
        """Configuration and policy for the requests that chose ``name``."""
        if name not in self._policies:
            config = self._configured.with_policy(name)
            self._policies[name] = config, config.create_policy()
        return self._policies[name]

    def _run(self, due: Batch[Judged], score_only: bool) -> PendingReports:
        """Compress the requests of a batch, or only score them."""
        watch, failures = Stopwatch(self.device), Failures(due.items, self._agree)
        points = [
            loss.curve_points(self.rank.candidate_pages(item), due.floor_pages, item.kept)
            for item in due.items
        ]
        found = statistics.measure(self.rank, due, ops.channel_mask(due.policy.channels))
        scores, freed, lost = self._judge(due, found, points, failures, not score_only)
        if score_only:
            nothing = self.state.num_pages[:0, : self.group.target_layers]
            return PendingReports(due.items, points, lost, nothing, watch, failures)
        carried_out = cast("Batch[Compression]", due)
        chosen = self._select(carried_out, scores, freed)
        kept_pages = self._compact(carried_out, chosen)
        pending = PendingReports(due.items, points, lost, kept_pages, watch, failures)
        for item, lengths in zip(due.items, pending.lengths(), strict=True):
            self._lengths[item.state_slot] = lengths
        return pending

    def _judge(
        self,
        due: Batch[Judged],
        found: Tensor,
        points: list[list[int]],
        failures: Failures,
        store: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Score and allocate, request by request, so that temporaries are those of one.

        Args:
            found: ``[channels, units, B]`` statistics; become sums where some are accumulated.
            points: block counts of every request's loss curve.
            store: whether the accumulated statistics become those sums, too.

        Returns:
            ``[units, B]`` scores of all candidates but those of draft layers; ``[A]`` int32 pages
            to free in every group of heads, by request; ``[sum of points]`` share of the score mass
            lost at each.
        """
        scores = torch.empty(found.shape[1:], dtype=torch.float32, device=found.device)
        summed = (ops.channel_mask(due.policy.channels) & ops.ATTENTION_CHANNELS).bit_count()
        freed, lost = [], []
        for index, (begin, end) in enumerate(due.spans):
            item, own, counts = due.items[index], found[:, begin:end], None
            if item.observed is not None:
                row = due.rows[index]
                counts = statistics.add_up(self.rank, item, row, own[:summed], store)
            rectangle = Rectangle.of(self.rank, item, self._width(item))
            end = begin + rectangle.units  # what draft layers have comes last
            own = own[:, : rectangle.units]
            counts = None if counts is None else counts[: rectangle.units]
            known = evidence_of(self.rank, due, index, rectangle, own, counts)
            verdict = self._verdict(due, index, known, rectangle, points[index], failures)
            scores[begin:end] = rectangle.gathered(verdict.scores.reshape(-1, found.shape[2]))
            freed.append(verdict.freed[0])
            lost.append(verdict.lost)
        return scores, freed, torch.cat(lost)

    def _verdict(
        self,
        due: Batch[Judged],
        index: int,
        known: Evidence,
        rectangle: Rectangle,
        points: list[int],
        failures: Failures,
    ) -> Verdict:
        """What a request's keys are worth, and which heads give back how much. A policy that fails
        is replaced by the latest keys, one threshold over all heads: a choice that can always be
        made."""
        item, allocator, rank = due.items[index], due.config.allocator, self.rank
        m, page_keys = rank.group.blocks_per_page, rank.group.page_keys
        lengths = None if rectangle.lengths is None else rectangle.lengths // m
        shielded = known.shielded()
        try:
            judged = judge.scores(due.policy, known, shielded)
            scores = self._shielded(item, judged.scores)
            shares = judge.shares(due.policy, known, scores, allocator)
            failures.may_have(index, judged.wrong)
        except PolicyError as error:
            failures.has(index, error)
            judged = judge.no_scores(known)
            scores, shares, allocator = self._shielded(item, judged.scores), Shares(), "global"
        freed = allocation.freed_pages(
            [item.kept, *points],
            allocator,
            shares,
            known,
            page_keys,
            due.floor_pages,
            rank.candidate_pages(item),
            lengths,
        )
        costs, masses = loss.page_masses(scores, shielded, page_keys, judged.worth)
        each = rectangle.width // m if lengths is None else lengths.flatten()
        lost = loss.loss_at(costs, masses, each, due.floor_pages, freed[1:])
        return Verdict(scores, freed, lost)

    def _shielded(self, item: Judged, scores: Tensor) -> Tensor:
        if not item.protect:
            return scores
        return self._protected.shield(item, scores)

    def _width(self, item: Judged) -> int:
        """Units of the longest head among the candidates, or more while only the device knows.

        Of a long generation heads keep far fewer pages than it has blocks.
        """
        longest = self._lengths[item.packed_slot].longest() if item.old_kept else None
        if longest is None:
            return item.covered
        return longest * self.group.blocks_per_page + item.covered - item.old_covered

    def _select(
        self, due: Batch[Compression], scores: Tensor, freed: list[Tensor]
    ) -> list[Selection]:
        """Choose the keys to keep; at once for all requests whose heads compete alike."""
        chosen = []
        for groups in dict.fromkeys(row.shape[0] for row in freed):
            which = [i for i, row in enumerate(freed) if row.shape[0] == groups]
            part = due.part(which)
            tables = part.state_slot, *self.state.tables
            if self.group.draft_layers:
                tables = drafts.target_rows(self.rank, part.state_slot)
            found = ops.select_pages(
                scores,
                part.unit_start,
                *tables,
                part.covered,
                torch.stack([freed[i] for i in which]),
                to_device(part.recent, torch.int32, scores.device),
                due.sinks,
                due.floor_pages,
                sum(item.kept for item in part.items) * self.group.target_heads,
            )
            kept = found
            if self.group.draft_layers:
                kept = drafts.with_draft_layers(self.rank, part, found)
            chosen.append(Selection(which, part, found, kept))
        return chosen

    def _compact(self, due: Batch[Compression], chosen: list[Selection]) -> Tensor:
        """Move what is kept into the new blocks, and describe it in the state tables.

        Returns:
            ``[R, L, H]`` int32, pages that every head of every request keeps, draft layers left
            out.
        """
        state = self.state
        moved = []
        if due.items[0].observed is not None and state.accumulated is not None:
            moved.append(state.accumulated)
        if state.echo is not None and ops.ECHO in due.policy.channels:
            moved.append(state.echo.unsqueeze(-1))
        for _, part, (kept_pages, _, kept_keys), kept in chosen:
            new_blocks = batch.padded_rows([item.new_blocks for item in part.items], self.device)
            before = part.rows, part.state_slot, *state.tables
            new_scales = None
            if state.page_scales is not None:
                new_scales = ops.fit_scales(self.pages, *before, *kept)
            ops.compact_pages(self.pages, *before, *kept, new_blocks, new_scales)
            for stored in moved:
                ops.compact_pages(stored, *before, *kept, new_blocks, None)
            self._note(part, kept_pages, kept_keys)
            state.install(
                [item.state_slot for item in part.items],
                [item.new_blocks for item in part.items],
                [item.covered for item in part.items],
                kept[0],
                new_scales,
            )
        if len(chosen) == 1:
            return chosen[0].chosen[0]
        order = to_device([i for c in chosen for i in c.which], torch.int64, self.device)
        return torch.cat([c.chosen[0] for c in chosen])[order.argsort()]

    def _note(self, part: Batch[Compression], kept_pages: Tensor, kept_keys: Tensor) -> None:
        """Follow protected ranges, and record what is kept."""
        begin = 0
        for index, item in enumerate(part.items):
            end = begin + item.kept * self.group.target_heads
            if item.protect:
                self._protected.moved(item, kept_keys[begin:end], kept_pages[index])
            if self.record is not None:
                heads = kept_keys[begin:end].split(kept_pages[index].flatten().tolist())
                self.record[item.request_id] = [keys.flatten() for keys in heads]
            begin = end
