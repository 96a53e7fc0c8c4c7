# SPDX-License-Identifier: Apache-2.0
"""Packed prefixes that requests share, in vLLM's block pool; see ``scheduling/contexts.py``.

Their blocks are entries of vLLM's own hash map. So vLLM counts who uses them, frees them behind
what was used less recently, and gives them away when it runs out of others, and
``reset_prefix_cache`` forgets them like all that it has cached.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    BlockHashWithGroupId,
    KVCacheBlock,
    make_block_hash_with_group_id,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from kvcompress_vllm.integration.compat.releases import waiting_queues
from kvcompress_vllm.integration.engine.context_names import ContextNames
from kvcompress_vllm.integration.engine.groups import OtherGroups
from kvcompress_vllm.integration.engine.kv_cache import PRIVATE, budget_of
from kvcompress_vllm.integration.engine.tails import Tails
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.reporting.shared import SharedRecorder, SharedReport
from kvcompress_vllm.reporting.usage import UsageLog
from kvcompress_vllm.scheduling.contexts import Context
from kvcompress_vllm.scheduling.planner import CompressionPlanner

_KEYS = "kv_compress_contexts"
_REMEMBERED = 1024
"""Requests of which it can be told which context they had."""


class Sharing:
    """Finds, registers and forgets contexts, and has requests wait for one that is computed.

    Args:
        others: with the manager of the blocks. The pool's ``get_new_blocks`` is replaced; its
            ``on_packed`` is set once it is of use. Where there is another group nothing is shared:
            what layers with a window hold of a context is not kept with it, so nobody could go on
            from there.
        planner: knows who uses what.
        usage: is told what requests took.
        requests: all of the scheduler, by id.
        lookahead: as of :class:`ContextNames`.

    Attributes:
        names: which contexts requests have, and whether anything is shared.
        tails: what was computed behind contexts.
    """

    def __init__(
        self,
        others: OtherGroups,
        planner: CompressionPlanner,
        usage: UsageLog,
        requests: Mapping[str, Request],
        lookahead: int,
    ) -> None:
        manager = others.manager
        self.tails = Tails(manager)
        self._manager, self._planner, self._usage = manager, planner, usage
        self._others = others
        self._contexts, pool = planner.contexts, manager.block_pool
        self._contexts.on_drop = self._forget
        self._waiting: dict[str, Request] = {}
        self._recorder = SharedRecorder()
        on = planner.config.share != "off" and pool.enable_caching and not others
        self.names = ContextNames(manager, planner, requests, on, lookahead)
        self._started: deque[tuple[str, bytes]] = deque(maxlen=_REMEMBERED)
        stock = pool.get_new_blocks

        def get_new_blocks(num_blocks: int) -> list[KVCacheBlock]:
            blocks: list[KVCacheBlock] = stock(num_blocks)
            self._contexts.reallocated(block.block_id for block in blocks)
            return blocks

        pool.get_new_blocks = get_new_blocks  # type: ignore[method-assign]

    def added(self, request: Request, budget: RequestBudget | None) -> None:
        """Note whether a new request has contexts that can be shared."""
        if self._planner.sizes(budget).stride:
            # Nobody else is asked on every step what it has computed.
            self._others.on_packed = self.computed
        keys = self.names.of(request, budget)
        if keys:
            setattr(request, _KEYS, keys)
            if self.names.repeats(request):
                # Its keys get scores that nobody must find beside them in the prefix cache.
                setattr(request, PRIVATE, True)
            self._waiting[request.request_id] = request

    def wanted(self, request: Request) -> dict[int, bytes]:
        """Contexts that a request has and that could be shared: key by tokens, ascending."""
        keys: dict[int, bytes] = getattr(request, _KEYS, {})
        return keys

    def computed(self, request: Request, num_tokens: int) -> None:
        """Offer what a packed request has computed, as far as that is what others would."""
        tracked = self._planner.requests.get(request.request_id)
        if tracked is not None:
            self.tails.computed(request, tracked, num_tokens)

    def find(self, request: Request) -> Context | None:
        """What a request that starts its prefill now need not compute; None: nothing."""
        if request.skip_reading_prefix_cache:
            return None
        for key in reversed(self.wanted(request).values()):
            context = self._contexts.get(key)
            # Of a prompt that ends with its context the last token must be computed, over all keys.
            if context is None or context.num_tokens >= request.num_tokens:
                continue
            if all(self._holds(context, index) for index in range(context.packing.kept)):
                return context
            self._contexts.retire(context)  # vLLM has forgotten some of it
        return None

    def row(self, context: Context) -> list[KVCacheBlock]:
        """The first F blocks of a row: packed and null blocks."""
        pool, (covered, kept) = self._manager.block_pool, context.packing
        null = [pool.null_block] * (covered - kept)
        return [pool.blocks[block] for block in context.blocks] + null

    def take(self, request_id: str, context: Context) -> None:
        """Let a row be packed, before vLLM gives the request these blocks. What it computes attends
        to fewer keys than its hash says, so vLLM must not cache any of it."""
        self._manager.packed[request_id] = context.packing

    def leave(self, request_id: str) -> None:
        """Undo ``take``: there was no room for the request."""
        del self._manager.packed[request_id]

    def register(self, context: Context, blocks: Collection[int]) -> None:
        """Offer what is packed into ``blocks`` to all requests with the same context."""
        self._contexts.add(context, blocks)
        pool, size = self._manager.block_pool, self._manager.block_size
        for index, block in enumerate(blocks):
            pool._insert_block_hash(
                self._hash(context, index), pool.blocks[block], num_tokens=(index + 1) * size
            )

    def replaced(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Let what contexts were packed from be given away first: it is found as long as it lasts,
        but whoever has the same context takes that. Else the pool would be full of both."""
        queue = self._manager.block_pool.free_block_queue
        idle = [
            block
            for block in {block.block_id: block for block in reversed(blocks)}.values()
            if block.ref_cnt == 0 and not block.is_null
        ]
        for block in idle:
            queue.remove(block)
        queue.prepend_n(idle)

    def hold_back(self, scheduler: Scheduler) -> tuple[list[Request], list[Request]]:
        """Waiting requests whose context another computes now, and those whose context another
        will compute before them; they would compute it once more.

        The first go before everybody else once it is packed: later it may be gone. Those who are
        passed wait for no more than these, as who comes then keeps the place in the queue.
        """
        contexts = self._contexts
        served: list[Request] = []
        held: list[Request] = []
        if not self._waiting:
            return served, held
        first: set[bytes] = set()

        def state_of(key: bytes) -> str | None:
            if contexts.get(key) is not None:
                return "held"
            if contexts.computing(key) is not None:
                return "computed"
            return "awaited" if key in first else None

        repeated = self._planner.replays
        for queue in waiting_queues(scheduler):
            for request in queue:
                keys = self.wanted(request)
                if not keys:
                    continue
                if request.skip_reading_prefix_cache:
                    # Computes it in any case.
                    if not self.names.repeats(request):
                        continue
                else:
                    state = next(filter(None, map(state_of, reversed(keys.values()))), None)
                    if state in ("computed", "awaited"):
                        (served if state == "computed" else held).append(request)
                        continue
                    if state == "held" and len(keys) == 1:
                        continue
                if request.status not in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
                    continue  # who waits for a grammar, say, computes nothing for others yet
                if self.names.repeats(request):
                    # One context is repeated at a time: its blocks wait for room to do so.
                    if repeated:
                        held.append(request)
                        continue
                    repeated = True
                first.update(keys.values())
        self._recorder.waited(len(served) + len(held))
        return served, held

    def started(self, request: Request, context: Context | None, found: int) -> None:
        """Note that a request no longer waits, and what it took: with what it found behind the
        context, ``found`` tokens."""
        self._waiting.pop(request.request_id, None)
        keys = self.wanted(request)
        self._recorder.started(found if context is not None else 0, bool(keys))
        self._started += [(request.request_id, key) for key in keys.values()]
        if context is not None:
            tracked = self._planner.requests[request.request_id]
            if tracked.prefix is not None:
                tracked.cached = found  # others find it, too
            row = len(self._manager.req_to_blocks[request.request_id])
            self._usage.took(request.request_id, context.num_tokens, context.packing, row)

    def report(self) -> SharedReport:
        """What happened since the last call, and what is held now."""
        return self._recorder.take(list(self._contexts), self._contexts.described)

    def released(self, request: Request | None, request_id: str) -> None:
        """Note that a request gave its blocks up: it is gone, or waits again."""
        if request is None or request.is_finished():
            self._waiting.pop(request_id, None)
        else:
            self.added(request, budget_of(request))  # its answer has marks of its own by now

    def described(self, request_id: str | None = None) -> list[dict[str, Any]]:
        """Every context that a request could take, for people.

        Args:
            request_id: only the one that this request took or computed. vLLM may have appended
                something to it.
        """
        found = list(self._contexts)
        if request_id is not None:
            keys = [key for name, key in self._started if name.startswith(request_id)]
            found = [context for context in found if context.key in keys]
        return [
            {
                "id": context.name,
                "context_tokens": context.num_tokens,
                "blocks": context.packing.kept,
                "blocks_uncompressed": context.packing.covered,
                "users": len(context.users),
                "hits": context.hits,
            }
            for context in found
        ]

    def drop(self, name: str | None = None) -> int:
        """Retire a context, or all; how many that were."""
        found = [context for context in self._contexts if name in (None, context.name)]
        for context in found:
            self._contexts.retire(context)
        return len(found)

    def check_integrity(self) -> None:
        """Check that users are who vLLM counts, and that rows start with what they share.

        Raises:
            RuntimeError: with the numbers of the first violation.
        """
        users: dict[str, Context] = {}
        for context in self._contexts.described:
            users.update(dict.fromkeys(context.users, context))
        shared = {t.request_id: t.context for t in self._planner.packed() if t.context is not None}
        if users != shared:
            raise RuntimeError(
                f"kv_compress: contexts know the users {sorted(users)}, requests that use one are "
                f"{sorted(shared)}"
            )
        for request_id, context in users.items():
            row = self._manager.row(request_id, context.packing.kept)
            if tuple(row) != context.blocks:
                raise RuntimeError(
                    f"kv_compress: {request_id} starts with blocks {row}, its context has "
                    f"{context.blocks}"
                )

    def _hash(self, context: Context, index: int) -> BlockHashWithGroupId:
        """Under which vLLM knows a block of a context. Only whoever has the key can find it."""
        name = hashlib.sha256(context.key + index.to_bytes(4, "big")).digest()
        return make_block_hash_with_group_id(BlockHash(name), self._manager.kv_cache_group_id)

    def _holds(self, context: Context, index: int) -> bool:
        block = self._manager.block_pool.blocks[context.blocks[index]]
        return block.block_hash == self._hash(context, index)

    def _forget(self, context: Context) -> None:
        """Let vLLM forget what is left of a context: without one of its blocks the others are of no
        use."""
        left = [block for i, block in enumerate(context.blocks) if self._holds(context, i)]
        self._manager.block_pool.evict_blocks(set(left))
