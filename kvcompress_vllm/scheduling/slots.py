# SPDX-License-Identifier: Apache-2.0
"""Numbered places of the workers' tables: state slots, and places in the observation ring."""

from __future__ import annotations

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.records.group import CacheGroup


class Slots:
    """The numbers below ``count``; true while one is free."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """A free one, from now on taken."""
        return self._free.pop()

    def give(self, slot: int) -> None:
        """Give back what was taken."""
        self._free.append(slot)


def num_observe_slots(
    config: KVCompressConfig,
    max_batched_tokens: int,
    max_requests: int,
    num_blocks: int,
    group: CacheGroup,
    drafts: int = 0,
) -> int:
    """Observation slots of an engine; scheduler and workers compute the same number.

    At most ``max_batched_tokens / min_prompt_tokens`` prompts can end in one step, and as many may
    still wait for their packed blocks; requests beyond that wait their turn. Where decoded tokens
    are scored, everybody who runs needs one: who has none keeps all that it decodes. The ring must
    not eat what compression saves: it takes at most a small part of the KV cache.

    Args:
        max_batched_tokens: tokens in a step.
        max_requests: requests in a step.
        num_blocks: of the KV cache.
        group: what they hold.
        drafts: tokens that a step may compute of a generation beyond its next.
    """
    per_step = -(-max_batched_tokens // config.min_prompt_tokens) + 1
    # A slot holds ring * G queries per KV head; a token of the cache is a K and a V vector.
    vectors = num_blocks * group.block_size * 2
    share = LISTENING_SHARE if config.listens else RING_SHARE
    of_slot = config.ring(drafts) * group.queries_per_head
    affordable = vectors // (share * of_slot)
    if config.listens and config.context_stride is not None:
        affordable = max(affordable, min(CONVERSING, 2 * vectors // (share * of_slot)))
    useful = max_requests if config.listens else min(2 * per_step, max_requests)
    return max(FEWEST_OBSERVE_SLOTS, min(useful, affordable))


def num_context_slots(num_blocks: int) -> int:
    """State slots for packed prefixes that requests share; scheduler and workers compute the same
    number. A context has at least one block, and usually dozens.

    Args:
        num_blocks: blocks of the pool.
    """
    return max(FEWEST_CONTEXTS, min(MOST_CONTEXTS, num_blocks // 8))


FEWEST_CONTEXTS, MOST_CONTEXTS = 8, 256
"""Each takes two numbers per KV head in the state tables."""

RING_SHARE = 100
"""The ring takes at most one in so many bytes of the KV cache."""

LISTENING_SHARE = 25
"""The same where decoded tokens are scored. A slot takes as much as ``DECODED * G / 2`` tokens of
the cache, two blocks of an 8B model, and saves more once an answer is longer than that. With a
stride of the server ``SEGMENT`` takes the place of ``DECODED``."""

CONVERSING = 16
"""So many may take twice that share in a small cache with a stride of the server: a turn whose
message passes the end of a segment needs two to be read in one step, and an answer without any is
no segment, so that the next turn computes up to ``SEGMENT`` tokens anew."""

FEWEST_OBSERVE_SLOTS = 4
"""With fewer, prompts would wait for each other even on a tiny cache."""
