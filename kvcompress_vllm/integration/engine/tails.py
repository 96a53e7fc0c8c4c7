# SPDX-License-Identifier: Apache-2.0
"""What requests compute behind a packed context, kept for who comes with the same tokens.

With a stride a request is compressed at its marks and nowhere else. So what it computes behind one
of them, read or decoded, follows from the context that is packed there and from the tokens since:
the next turn of a conversation goes on from there. vLLM's own hashes would be wrong for it, as it
attends to fewer keys than they say; it goes into vLLM's hash map under both names together.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.request import Request

from kvcompress_vllm.integration.engine.kv_cache import KVCompressManager
from kvcompress_vllm.scheduling.contexts import Context
from kvcompress_vllm.scheduling.request import Tracked

_NAMES = "kv_compress_tail_names"
"""Attribute of a request: the names that were asked for."""


class _Names(NamedTuple):
    before: bytes
    """What they begin with."""
    by_block: dict[int, BlockHash]


class Tails:
    """Offers and finds full blocks behind contexts.

    Args:
        manager: of the blocks.
    """

    def __init__(self, manager: KVCompressManager) -> None:
        self._manager = manager
        self._forgotten = 0

    def forget(self) -> None:
        """Offer nothing of what there is: a policy failed, so that what was computed behind its
        contexts is not what others would compute."""
        self._forgotten += 1

    def found(self, request: Request, context: Context, end: int) -> list[KVCacheBlock]:
        """The blocks right behind a context that hold what a request has there.

        Args:
            end: none beyond so many tokens.
        """
        pool, group = self._manager.block_pool, [self._manager.kv_cache_group_id]
        blocks: list[KVCacheBlock] = []
        size = self._manager.block_size
        first = context.num_tokens // size
        for name in self.names(request, context.key, first, end // size):
            block = pool.get_cached_block(name, group)
            if block is None:
                break
            blocks += block
        return blocks

    def computed(self, request: Request, tracked: Tracked, num_tokens: int) -> None:
        """Offer what a request has computed by the end of the step that is planned now.

        Args:
            tracked: the same request.
            num_tokens: computed ones.
        """
        if tracked.prefix is None:
            return
        manager, size = self._manager, self._manager.block_size
        # What was drafted may be rejected. Nobody looks for what is behind the next mark: whoever
        # has as many tokens is compressed there first.
        known = min(num_tokens, request.num_tokens)
        first = max(tracked.cached // size, tracked.covered)
        row = manager.req_to_blocks[request.request_id]
        for index in range(first, known // size):
            name = self.name(request, tracked.prefix, index)
            if name is None:
                return
            if row[index].block_hash is None:
                manager.block_pool._insert_block_hash(
                    make_block_hash_with_group_id(name, manager.kv_cache_group_id),
                    row[index],
                    num_tokens=(index + 1) * size,
                )
            tracked.cached = (index + 1) * size

    def name(self, request: Request, prefix: bytes | None, index: int) -> BlockHash | None:
        """Of a block of a request's row; None: not all its tokens are known.

        Args:
            prefix: key of the context that it is behind; None: nothing is packed.
        """
        found = self.names(request, prefix, index, index + 1)
        return found[0] if found else None

    def names(
        self, request: Request, prefix: bytes | None, first: int, end: int
    ) -> list[BlockHash]:
        """The same of blocks ``[first, end)``, as far as their tokens are known."""
        times = self._manager.block_size // self._manager.block_pool.hash_block_size
        known = request.block_hashes[(first + 1) * times - 1 : end * times : times]
        if prefix is None:
            return known
        before = prefix + self._forgotten.to_bytes(8, "big")
        # Of a request that starts everybody asks for the same ones.
        names: _Names | None = getattr(request, _NAMES, None)
        if names is None or names.before != before:
            names = _Names(before, {})
            setattr(request, _NAMES, names)
        found, by_block = [], names.by_block
        for index, tokens in enumerate(known, first):
            name = by_block.get(index)
            if name is None:
                name = by_block[index] = BlockHash(hashlib.sha256(before + tokens).digest())
            found.append(name)
        return found
