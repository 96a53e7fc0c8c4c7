# SPDX-License-Identifier: Apache-2.0
"""Segments that a request with a stride left unfinished, for the next turn to go on there.

Echo scores of a segment need all its queries at once (``scheduling/segments.py``). Whoever ends in
the middle of one leaves its queries in blocks of the pool, in vLLM's hash map beside the blocks of
their tokens, and vLLM evicts them like these. Who comes with the same tokens computes none of them
anew: it brings the queries into its own observation slot, and the segment is scored once it is
complete.

Scores lie beside the blocks of the tokens, and depend on what comes behind them. So only one
request at a time goes on from some blocks, and for whoever had completed a segment with them it is
no longer whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from kvcompress_vllm.integration.engine.kv_cache import KVCompressManager
from kvcompress_vllm.integration.engine.tails import Tails
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import SavedQueries
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.request import Tracked
from kvcompress_vllm.scheduling.segments import SEGMENT, WholeBlocks
from kvcompress_vllm.scheduling.sizes import NEVER


class _Found(NamedTuple):
    request_id: str
    begin: int
    """Where the segment begins."""
    row: list[int]
    """Blocks of its tokens."""
    queries: list[KVCacheBlock]
    """Blocks of their queries; none where the request will not need any."""


class UnfinishedSegments:
    """Keeps and finds the queries of segments that are not complete.

    Args:
        manager: of the blocks.
        planner: knows who listens to what.
        tails: names what was computed behind contexts.
        group: says how large queries are.
        whole: told who goes on where; None: nobody gets blocks of others.
    """

    def __init__(
        self,
        manager: KVCompressManager,
        planner: CompressionPlanner,
        tails: Tails,
        group: CacheGroup,
        whole: WholeBlocks | None,
    ) -> None:
        self._manager, self._planner, self._tails, self._whole = manager, planner, tails, whole
        # A block holds a K and a V vector of each of its tokens and heads.
        self._parts = -(-group.queries_per_head // 2)
        self._found: _Found | None = None
        self._saved: list[SavedQueries] = []
        self._loaded: list[SavedQueries] = []

    def ended(self, request: Request) -> None:
        """Keep the queries of a request that has ended and still has its blocks."""
        tracked = self._planner.requests.get(request.request_id)
        if self._whole is None or tracked is None or tracked.listen_slot is None:
            return
        named = tracked.prefix is not None or not tracked.kept
        listen_slot, begin, size = tracked.listen_slot, tracked.listened, self._manager.block_size
        if tracked.heard_slot is not None:  # it has ended before that could be scored
            listen_slot, begin = tracked.heard_slot, tracked.heard_until - SEGMENT
        if begin % SEGMENT or not named or not self._planner.observers.is_whole(tracked):
            return
        known = min(request.num_computed_tokens, request.num_tokens)
        count = min(max(0, known - begin), SEGMENT - size) // size
        names = self._names(request, tracked.prefix, begin // size, count)
        pool = self._manager.block_pool
        if not names or pool.get_num_free_blocks() < len(names):
            return
        blocks: list[KVCacheBlock] = []
        while held := self._all_held(names[len(blocks) :][: self._parts]):
            blocks += held  # what it took over itself, perhaps: as good as new
        for block in blocks:
            pool.free_block_queue.remove(block)
            block.ref_cnt += 1
        first = len(blocks)
        blocks += pool.get_new_blocks(len(names) - first)
        for index in range(first, len(names)):
            pool._insert_block_hash(
                make_block_hash_with_group_id(names[index], self._manager.kv_cache_group_id),
                blocks[index],
                num_tokens=begin + (index // self._parts + 1) * size,
            )
        # The first ones are worth most: without them nobody can use the others.
        pool.free_blocks(reversed(blocks))
        ids = [block.block_id for block in blocks[first:]]
        if ids:
            begin += first // self._parts * size
            num_tokens = len(ids) // self._parts * size
            saved = SavedQueries(request.request_id, listen_slot, begin, num_tokens, ids)
            self._saved.append(saved)

    def find(
        self, request: Request, starting: Tracked, begin: int, row: Sequence[KVCacheBlock]
    ) -> list[KVCacheBlock]:
        """What a request may have of a segment that is not whole; nobody else has any of it. All
        that there is, where no compression will come that goes by scores.

        Args:
            starting: the request as it would start.
            begin: where the segment begins.
            row: blocks with its tokens, in the cache.
        """
        self._found = None
        if self._whole is None:
            return []
        if starting.due_at == NEVER:
            return self._take(request, begin, list(takewhile(_is_idle, row)), [])
        if not self._planner.observers.can_take_over(starting):
            return []
        size, queries = self._manager.block_size, list[KVCacheBlock]()
        row = row[: SEGMENT // size - 1]
        names = self._names(request, starting.prefix, begin // size, len(row))
        count = 0
        for block in row[: len(names) // self._parts]:
            parts = self._all_held(names[count * self._parts :][: self._parts])
            if not parts or not _is_idle(block):
                break
            queries += parts
            count += 1
        return self._take(request, begin, list(row[:count]), queries)

    def forget(self) -> None:
        """Whatever was found last is not what comes next."""
        self._found = None

    def until(self, request_id: str) -> int:
        """How far the next step of a request goes at most that is about to start, in a segment that
        it takes over; 0: it takes over none."""
        found = self._found
        if found is None or found.request_id != request_id or not found.queries:
            return 0
        return found.begin + SEGMENT

    def started(self, request_id: str) -> None:
        """Have a request that was admitted take over what was found for it."""
        found, self._found = self._found, None
        if found is None or found.request_id != request_id or self._whole is None:
            return
        self._whole.taken_over(found.row)
        tracked, num_tokens = self._planner.requests[request_id], len(found.row)
        num_tokens *= self._manager.block_size
        tracked.found_unscored(found.begin, found.begin + num_tokens)
        if not found.queries:
            return
        slot = self._planner.observers.take_over(tracked, found.begin)
        ids = [block.block_id for block in found.queries]
        self._loaded.append(SavedQueries(request_id, slot, found.begin, num_tokens, ids))

    def take_saved(self) -> list[SavedQueries]:
        """What was kept since the last call; before anything of a step is planned."""
        saved, self._saved = self._saved, []
        return saved

    def take_loaded(self) -> list[SavedQueries]:
        """What requests took over that start in the step which is planned now, and still hold the
        slot for: one that started behind them may have needed it to be compressed."""
        loaded, self._loaded = self._loaded, []
        requests = self._planner.requests
        return [
            item
            for item in loaded
            if (tracked := requests.get(item.request_id)) is not None
            and tracked.listen_slot == item.observe_slot
        ]

    def _take(
        self,
        request: Request,
        begin: int,
        row: list[KVCacheBlock],
        queries: list[KVCacheBlock],
    ) -> list[KVCacheBlock]:
        if row:
            ids = [block.block_id for block in row]
            self._found = _Found(request.request_id, begin, ids, queries)
        return row

    def _all_held(self, names: Sequence[BlockHash]) -> list[KVCacheBlock]:
        """The blocks with these queries; none, unless the pool has them all."""
        manager, blocks = self._manager, list[KVCacheBlock]()
        for name in names:
            found = manager.block_pool.get_cached_block(name, [manager.kv_cache_group_id])
            if not found:
                return []
            blocks += found
        return blocks

    def _names(
        self, request: Request, prefix: bytes | None, first: int, count: int
    ) -> list[BlockHash]:
        """Of the queries of ``count`` blocks of tokens, as far as all these are known."""
        return [
            BlockHash(hashlib.sha256(b"queries" + bytes([part]) + tokens).digest())
            for tokens in self._tails.names(request, prefix, first, first + count)
            for part in range(self._parts)
        ]


def _is_idle(block: KVCacheBlock) -> bool:
    return block.ref_cnt == 0
