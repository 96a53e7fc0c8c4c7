# SPDX-License-Identifier: Apache-2.0
"""Which contexts a request has that could be shared, and the key under which others find them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from vllm.v1.request import Request

from kvcompress_vllm.integration.engine.kv_cache import KVCompressManager, budget_of
from kvcompress_vllm.integration.frontend.requests import has_embeddings
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.repeated import STRIDE, Repeated
from kvcompress_vllm.scheduling.replay import may_repeat
from kvcompress_vllm.scheduling.request import Tracked


class ContextNames:
    """Names contexts by their tokens, and by all that their packing depends on.

    Args:
        manager: of the blocks, by whose hashes tokens are known.
        planner: knows where requests are compressed.
        requests: all of the scheduler, by id.
        on: whether anything is shared.
        lookahead: tokens behind a block on which its hash depends, too: keys of draft models do.

    Attributes:
        on: the same.
    """

    def __init__(
        self,
        manager: KVCompressManager,
        planner: CompressionPlanner,
        requests: Mapping[str, Request],
        on: bool,
        lookahead: int = 0,
    ) -> None:
        self._manager, self._planner, self._requests = manager, planner, requests
        self.on = on
        self._unhashed = -(-lookahead // manager.block_pool.hash_block_size)
        self._repeated = Repeated() if planner.config.share == "auto" and on else None

    def found(self, request: Request, budget: RequestBudget | None) -> RequestBudget | None:
        """The budget of a new request, with a context where its prompt begins like one before it
        (``share=auto``), and it names none itself."""
        repeated = self._repeated
        planner, contexts = self._planner, self._planner.contexts
        own = planner.sizes(budget).budget
        named = own.context_tokens is not None or own.context_stride
        if repeated is None or named or own.query_stride:
            return budget
        stride = math.lcm(STRIDE, self._manager.block_size)
        last = min(request.num_tokens - 1, self._named(request))
        lengths = range(stride, last + 1, stride)

        def held(length: int) -> bool:
            key = self._key(request, own, length)
            return contexts.get(key) is not None or contexts.computing(key) is not None

        n = repeated.context([(n, self._name(request, n)) for n in lengths], held)
        if n is None:
            return budget
        exact = planner.config.exact != "off" and planner.observers.reads_echo(own.policy)
        exact = exact and may_repeat(n, planner.limits.max_tokens) and not request.mm_features
        exact = exact and not has_embeddings(request)
        with_context = own._replace(context_tokens=n, exact=exact)
        return with_context if planner.sizes(with_context).reaches_context else budget

    def of(self, request: Request, budget: RequestBudget | None) -> dict[int, bytes]:
        """Of a request's contexts, by tokens: their tokens (with LoRA, multimodal inputs and salt),
        and all that their packing depends on. Empty: it has none, or none that could be shared."""
        sizes = self._planner.sizes(budget)
        if not self.on or sizes.budget.query_stride:
            return {}  # accumulated statistics are of the request that computed them
        return {
            n: self._key(request, sizes.budget, n)
            for n in self._planner.marks(sizes, request.num_tokens)
            # What ends there may keep more than half of the peak.
            if n < request.num_tokens or (n == request.num_tokens and not sizes.limits.peak_blocks)
            if n <= self._named(request)
        }

    def due(self, tracked: Tracked) -> bytes | None:
        """Of the context that a request with a stride is compressed as now, in its prompt or its
        answer; None: it could not be shared, or not all its tokens are known yet."""
        request, n = self._requests[tracked.request_id], tracked.due_at
        if not self.on or tracked.budget.query_stride or n > self._named(request):
            return None
        return self._key(request, tracked.budget, n)

    def repeats(self, request: Request) -> bool:
        """Whether the context of a request is repeated before it is packed."""
        return self._planner.sizes(budget_of(request)).budget.exact

    def _key(self, request: Request, budget: RequestBudget, n: int) -> bytes:
        protect = tuple((start, min(end, n)) for start, end in budget.protect if start < n)
        alike = budget._replace(protect=protect, context_tokens=n)
        return hashlib.sha256(self._name(request, n) + repr(alike).encode()).digest()

    def _named(self, request: Request) -> int:
        """Tokens of a request that have a name by now."""
        size = self._manager.block_pool.hash_block_size
        hashed = len(request.block_hashes) * size
        if not self._unhashed or not self._has_tokens(request):
            return hashed
        return min(hashed + self._unhashed * size, request.num_tokens)

    def _name(self, request: Request, n: int) -> bytes:
        """Of a request's first ``n`` tokens, which does not depend on what follows them::

        hashes       h0 h1 h2 h3          h3 is of t4 as well
        tokens    |  t0 t1 t2 t3 | t4     a name of four: h2 and the tokens of block 3
        """
        size, hashes = self._manager.block_pool.hash_block_size, request.block_hashes
        last = n // size - 1
        if not self._unhashed or not self._has_tokens(request):
            return hashes[last]
        before = max(-1, last - self._unhashed)
        tokens = list(request.all_token_ids[(before + 1) * size : n])
        known = hashes[before] if before >= 0 else b""
        salt = request.cache_salt, request.lora_request and request.lora_request.lora_name
        return hashlib.sha256(known + repr((salt, tokens)).encode()).digest()

    @staticmethod
    def _has_tokens(request: Request) -> bool:
        """Whether token ids say all that a request's keys depend on."""
        return not has_embeddings(request) and not request.mm_features
