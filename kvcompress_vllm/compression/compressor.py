# SPDX-License-Identifier: Apache-2.0
"""Compression of the due requests of a step: observe (done), score, allocate, select, compact.

Letters as in ``cache/layout.py``. Runs before the step's forward, on its stream. The
scheduler has fixed how many blocks each request keeps; this decides which keys they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.state import RUNNING, PackedState
from kvcompress_vllm.cache.transfer import Stopwatch, to_device
from kvcompress_vllm.compression import allocation, gather, loss
from kvcompress_vllm.compression.pending import PendingLengths, PendingReports
from kvcompress_vllm.compression.protection import Protected
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.policies import Evidence, Policy
from kvcompress_vllm.records import budget
from kvcompress_vllm.records.plan import Accumulation, Compression, Judged, Observed


class Compressor:
    """Carries out compressions on one rank.

    Args:
        config: the resolved options.
        state: this rank's tables, changed by :meth:`run`.
        pages: ``[P, B, 2 * D]`` page pool, changed by :meth:`run`.
        scale: factor on the attention logits.
    """

    def __init__(
        self, config: KVCompressConfig, state: PackedState, pages: Tensor, scale: float
    ) -> None:
        self._configured = config
        self.state = state
        self.pages = pages
        self.scale = scale
        self._policies: dict[str | None, tuple[KVCompressConfig, Policy]] = {}
        self.config, self.policy = self._use(None)
        self._floor = resolve(config).floor_pages(pages.shape[1])
        self._protected = Protected(state)
        self._lengths: dict[int, PendingLengths] = {}
        """By state slot, since its latest compression."""
        self.record: dict[str, list[Tensor]] | None = None
        """For tests, when not None: by request id, the kept key indices of every (layer, head)."""

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
            self.config, self.policy = self._use(policy)
            self._floor = floor or resolve(self.config).floor_pages(self.pages.shape[1])
            mine = [item for item in due if kind(item) == (policy, floor, stride)]
            for batch in _batches(mine, MOST_TOKENS // self.pages.shape[1]):
                pending.append(self._run(batch, score_only))
        return pending

    def accumulate(self, chunks: list[Accumulation]) -> None:
        """Add what was observed to the running statistics."""
        for policy in dict.fromkeys(item.policy for item in chunks):
            self.config, self.policy = self._use(policy)
            for item in chunks:
                if item.policy == policy:
                    rows = _rows([item.old_blocks], self.pages.device)
                    mask = ops.channel_mask(self.policy.channels) & ops.ATTENTION_CHANNELS
                    statistics = self._statistics([item], rows, mask)
                    self._count(item, rows[0], statistics)

    def _statistics(self, items: Sequence[Accumulation], rows: Tensor, channels: int) -> Tensor:
        """``[channels, pages, B]`` of the candidates of ``items``, one after the other.

        Args:
            rows: ``[R, M]`` int32 block ids.
            channels: mask; each op that has one of them runs, and its channels keep their order.
        """
        device, observed = self.pages.device, items[0].observed
        layers, heads = self.state.num_pages.shape[1:]
        starts = _starts([item.candidate_blocks * layers * heads for item in items])
        pages = (
            self.pages,
            rows,
            to_device([item.num_tokens for item in items], torch.int32, device),
            self.state.state_slots(rows),
            *self.state.tables,
        )
        candidates = (
            to_device([item.covered for item in items], torch.int32, device),
            to_device(starts[:-1], torch.int64, device),
            starts[-1],
        )
        parts: list[Tensor] = []
        of_keys = channels & ops.KEY_CHANNELS
        if of_attention := channels & ~of_keys:  # refuses what nobody knows
            num_queries = [
                item.observed.num_queries
                if item.observed
                else min(self.config.window, item.num_tokens)
                for item in items
            ]
            parts.append(
                ops.attention_statistics(
                    self.state.ring,
                    *pages,
                    to_device([item.observe_slot for item in items], torch.int32, device),
                    to_device(num_queries, torch.int32, device),
                    *candidates,
                    of_attention,
                    observed.stride if observed else 1,
                    self.scale,
                )
            )
        if of_keys:
            parts.append(ops.key_statistics(*pages, *candidates, of_keys))
        if not parts:
            return torch.empty(0, starts[-1], self.pages.shape[1], device=device)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _count(
        self,
        item: Accumulation,
        row: Tensor,
        statistics: Tensor,
        store: bool = True,
    ) -> Tensor:
        """Add the statistics of the observed queries to the running ones.

        Args:
            row: ``[M]`` int32 block ids.
            statistics: ``[channels, pages, B]`` of this request, those of the attention alone;
                become the sums.
            store: False leaves the running statistics as they are.

        Returns:
            ``[pages, B]`` fp32, how many queries saw each key.
        """
        running, observed = self.state.running, item.observed
        if running is None or observed is None:
            raise RuntimeError(f"kv_compress: {item.request_id} has no running statistics")
        pages, ages, known = self._candidates(item, row, observed)
        seen = ages.div(observed.stride, rounding_mode="floor") + 1
        counts = seen.clamp(max=observed.num_queries).float()
        before = running[pages].masked_fill_(~known[:, None, None], 0)
        counts += before[..., -1]
        for channel, values in enumerate(statistics):
            values += before[..., channel]
        if not store:
            return counts
        sums = torch.zeros_like(before)
        sums[..., -1] = counts
        sums[..., : len(statistics)] = statistics.permute(1, 2, 0)
        running[pages] = sums
        return counts

    def _candidates(
        self, item: Accumulation, row: Tensor, observed: Observed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a request's candidates, in the order of the statistics op.

        Returns:
            ``[pages]`` page ids; ``[pages, B]`` tokens after each key, a lower bound for keys that
            were packed before; ``[pages]`` bool, whether a page has running statistics.
        """
        state, device, block_size = self.state, self.pages.device, self.pages.shape[1]
        layers, heads = state.num_pages.shape[1:]
        slots, fresh = layers * heads, item.covered - item.old_covered
        index = torch.arange(slots, device=device)
        if item.old_kept:
            packed = state.num_pages[item.state_slot].flatten().long()
            first = state.first_page[item.state_slot].flatten().long()
        else:
            packed = first = torch.zeros_like(index)
        total = item.candidate_blocks * slots
        head = index.repeat_interleave(packed + fresh, output_size=total)
        j = torch.arange(total, device=device) - (first + index * fresh)[head]
        pages = layout.page_id(row, item.old_covered, packed[head], first[head], head, slots, j)
        # In the row's own count of blocks; packed pages stand for some block before them.
        block = torch.where(
            j < packed[head], item.old_covered - 1, item.old_covered + j - packed[head]
        )
        position = block[:, None] * block_size + torch.arange(block_size, device=device)
        return pages, item.num_tokens - 1 - position, block < observed.known

    def _use(self, name: str | None) -> tuple[KVCompressConfig, Policy]:
        """Configuration and policy for the requests that chose ``name``."""
        if name not in self._policies:
            config = self._configured.with_policy(name)
            self._policies[name] = config, config.create_policy()
        return self._policies[name]

    def _run(self, due: list[Judged], score_only: bool) -> PendingReports:
        state, device = self.state, self.pages.device
        watch = Stopwatch(device)
        layers, heads = state.num_pages.shape[1:]
        slots, block_size = layers * heads, self.pages.shape[1]
        covered = [item.covered for item in due]
        kept = [item.kept for item in due]
        starts = _starts([item.candidate_blocks * slots for item in due])

        rows = _rows([item.old_blocks for item in due], device)
        state_slot = state.state_slots(rows)
        tables = (state_slot, *state.tables)
        new_covered = to_device(covered, torch.int32, device)
        page_start = to_device(starts[:-1], torch.int64, device)

        running = due[0].observed is not None
        num_tokens = [item.num_tokens for item in due]
        channels = ops.channel_mask(self.policy.channels)
        statistics = self._statistics(due, rows, channels)
        summed = (channels & ops.ATTENTION_CHANNELS).bit_count()

        recent = [
            budget.num_recent(self.config.recent, count, blocks, block_size)
            for count, blocks in zip(num_tokens, covered, strict=True)
        ]
        scores = torch.empty(starts[-1], block_size, device=device)
        points = [
            loss.curve_points(item.candidate_blocks, self._floor, blocks)
            for item, blocks in zip(due, kept, strict=True)
        ]
        freed, lost = [], []
        for index, (begin, end) in enumerate(pairwise(starts)):
            of_request = statistics[:, begin:end]
            counts = None
            if running:
                counts = self._count(due[index], rows[index], of_request[:summed], not score_only)
            scores[begin:end], groups, losses = self._choose(
                due[index], rows[index], of_request, counts, recent[index], points[index]
            )
            freed.append(groups)
            lost.append(losses)
        if score_only:
            return PendingReports(due, points, torch.cat(lost), None, watch)
        carried_out = [item for item in due if isinstance(item, Compression)]
        kept_pages, kept_first, kept_keys = ops.select_pages(
            scores,
            page_start,
            *tables,
            new_covered,
            torch.stack(freed),
            to_device(recent, torch.int32, device),
            self.config.sinks,
            self._floor,
            sum(kept) * slots,
        )
        new_blocks = _rows([item.new_blocks for item in carried_out], device)
        ops.compact_pages(
            self.pages,
            rows,
            *tables,
            kept_pages,
            kept_first,
            kept_keys,
            new_blocks,
        )
        if running:
            ops.compact_pages(
                state.running, rows, *tables, kept_pages, kept_first, kept_keys, new_blocks
            )
        for index, item in enumerate(due):
            if item.protect:
                begin = sum(kept[:index]) * slots
                own = kept_keys[begin : begin + kept[index] * slots]
                self._protected.moved(item, own, kept_pages[index])
        state.install(
            [item.state_slot for item in due],
            [item.new_blocks for item in carried_out],
            covered,
            kept_pages,
        )
        if self.record is not None:
            keys = kept_keys.split(kept_pages.flatten().tolist())
            for index, item in enumerate(due):
                heads_of = keys[index * slots : (index + 1) * slots]
                self.record[item.request_id] = [head.flatten() for head in heads_of]
        pending = PendingReports(due, points, torch.cat(lost), kept_pages, watch)
        for item, lengths in zip(due, pending.lengths(), strict=True):
            self._lengths[item.state_slot] = lengths
        return pending

    def _width(self, item: Judged) -> int:
        """Pages of the longest head among the candidates, or more while only the device knows.

        Of a long generation heads keep far fewer pages than it has blocks.
        """
        longest = self._lengths[item.state_slot].longest() if item.old_kept else None
        if longest is None:
            return item.covered
        return longest + item.covered - item.old_covered

    def _choose(
        self,
        item: Judged,
        row: Tensor,
        statistics: Tensor,
        counts: Tensor | None,
        num_recent: int,
        points: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of one request's candidate keys, how many pages go, and what that loses.

        Policies see one rectangle, as wide as the longest head. Heads that were packed before end
        with it, so that the latest keys are in line. How long each is only the device knows.

        Args:
            row: ``[M]`` int32 block ids.
            statistics: ``[channels, pages, B]`` of this request; heads may differ in length.
            counts: ``[pages, B]`` queries that saw each key, or None.
            points: block counts of the loss curve, P of them.

        Returns:
            ``[pages, B]`` fp32, a row of the selection op's ``num_freed``, and ``[P]`` the share
            of the score mass that is lost at each of ``points``.
        """
        if counts is not None:
            statistics = torch.cat([statistics, counts[None]])
        pages, block_size = statistics.shape[1:]
        layers, heads = self.state.num_pages.shape[1:]
        slots, device = layers * heads, statistics.device
        lengths = absent = place = None
        width = self._width(item)
        if item.old_kept:
            fresh = item.covered - item.old_covered
            lengths = self.state.num_pages[item.state_slot] + fresh
            first = self.state.first_page[item.state_slot].view(slots, 1)
            first = first + torch.arange(slots, device=device).unsqueeze(1) * fresh
            j = torch.arange(width, device=device) - width + lengths.view(slots, 1)
            place = torch.where(j >= 0, first + j, pages).flatten().long()
            absent = (j < 0).repeat_interleave(block_size, 1)
            statistics = statistics[:, place.clamp(max=pages - 1)]
            statistics.masked_fill_((j < 0).view(1, -1, 1), 0)
        evidence = self._evidence(item, row, statistics, num_recent, absent, width)
        scores = self.policy.score(evidence)
        if item.protect:
            scores = self._protected.shield(item, scores, block_size)
        freed = allocation.freed_pages(
            [item.kept, *points],
            self.config.allocator,
            self.policy,
            evidence,
            scores,
            block_size,
            self._floor,
            item.candidate_blocks,
            lengths,
        )
        costs, masses = loss.page_masses(
            scores, evidence.shielded(), block_size, self.policy.worth(evidence)
        )
        longest = width if lengths is None else lengths.flatten()
        lost = loss.loss_at(costs, masses, longest, self._floor, freed[1:])
        scores = scores.reshape(-1, block_size)
        if place is not None:
            result = torch.empty(pages + 1, block_size, device=device)
            result[place] = scores
            scores = result[:pages]
        return scores, freed[0], lost

    def _evidence(
        self,
        item: Judged,
        row: Tensor,
        statistics: Tensor,
        num_recent: int,
        absent: Tensor | None,
        width: int,
    ) -> Evidence:
        """What the policy may look at; ``statistics`` ``[channels, L * H * width, B]``."""
        state, block_size = self.state, self.pages.shape[1]
        layers, heads = state.num_pages.shape[1:]
        left_out = (item.covered - width) * block_size
        num_queries = min(self.config.window, item.num_tokens)
        counts = None
        if item.observed is not None:
            counts = statistics[-1].reshape(layers * heads, -1)
            num_queries = item.observed.before + item.observed.num_queries
        packed = gather.Packed(item.state_slot, item.old_covered) if item.old_kept else None
        keys, values, queries = gather.readers(
            self.pages,
            row,
            item.num_tokens,
            state,
            item.observe_slot,
            min(self.config.window, item.num_tokens),
            packed,
            left_out,
        )
        return Evidence(
            layers=layers,
            heads=heads,
            group=state.ring.shape[3] // heads,
            num_keys=width * block_size,
            num_kept=item.kept * block_size,
            seq_len=item.num_tokens - left_out,
            num_queries=num_queries,
            num_sinks=self.config.sinks,
            num_recent=num_recent,
            scale=self.scale,
            device=self.pages.device,
            statistics={
                channel: values_of.reshape(layers * heads, -1)
                for channel, values_of in zip(
                    sorted(self.policy.channels), statistics, strict=counts is None
                )
            },
            counts=counts,
            density=item.candidate_blocks / item.covered,
            absent=absent,
            keys=keys,
            values=values,
            queries=queries,
        )


MOST_TOKENS = 4096
"""Candidate tokens of a batch of compressions, unless a single request has more. Bounds the memory
for statistics and scores without making many small compressions wait for each other."""


def scratch_bytes(
    policy: Policy,
    num_tokens: int,
    num_layers: int,
    num_kv_heads: int,
    head_size: int,
    running: bool = False,
) -> int:
    """Memory that a compression takes while it runs.

    Args:
        num_tokens: tokens of the longest request.
    """
    # Per candidate key: its statistics, then its score and the policy's temporaries; or the
    # statistics once more, while those of two ops are put together.
    count = len(policy.channels)
    per_key = 4 * (count + max(5, count))
    if running:
        per_key += 3 * 4 * RUNNING  # the statistics so far, their sums, and an intermediate
    keys = max(num_tokens, MOST_TOKENS) * num_layers * num_kv_heads
    # One layer of keys or values, as copied, in fp32, and an intermediate of it.
    copies = 3 * num_tokens * num_kv_heads * head_size * 4 if policy.needs_keys else 0
    return keys * per_key + loss.scratch_bytes(keys) + copies


def _batches(due: list[Judged], most_blocks: int) -> Iterator[list[Judged]]:
    """Runs of requests with at most ``most_blocks`` candidate blocks, or of a single request."""
    batch: list[Judged] = []
    blocks = 0
    for item in due:
        if batch and blocks + item.candidate_blocks > most_blocks:
            yield batch
            batch, blocks = [], 0
        batch.append(item)
        blocks += item.candidate_blocks
    if batch:
        yield batch


def _rows(blocks: list[list[int]], device: torch.device) -> Tensor:
    """``[R, M]`` int32, ragged rows padded with the null block."""
    width = max(map(len, blocks))
    padded = [row + [0] * (width - len(row)) for row in blocks]
    return to_device(padded, torch.int32, device)


def _starts(counts: list[int]) -> list[int]:
    """Exclusive prefix sums, and the total last."""
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
