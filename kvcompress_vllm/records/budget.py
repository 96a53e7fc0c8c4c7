# SPDX-License-Identifier: Apache-2.0
"""How many blocks a request keeps. Known to the scheduler before any score exists."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvcompress_vllm.config.options import DEFAULT_RATIO, KVCompressConfig


class Wish(NamedTuple):
    """What one request asked for; None: as configured. At most one of ratio, budget and mass,
    except that a ratio beside a mass is the one expected of it."""

    ratio: float | None = None
    budget_tokens: int | None = None
    policy: str | None = None
    context_tokens: int | None = None
    """Compress once so many tokens are computed, before the rest of the prompt is read."""
    protect: tuple[tuple[int, int], ...] = ()
    """Positions ``[start, end)`` that are never evicted: ascending, apart from each other."""
    mass: float | None = None

    def num_protected(self, num_sinks: int, num_keys: int) -> int:
        """Protected ones of the candidate keys of positions ``[num_sinks, num_keys)``."""
        return sum(
            max(0, min(end, num_keys) - max(start, num_sinks)) for start, end in self.protect
        )


KEEP_ALL = Wish(ratio=1.0)


def num_recent(config: KVCompressConfig, num_tokens: int, covered: int, block_size: int) -> int:
    """Candidate keys at the end of every head that the recent window shields.

    The window is the last ``config.recent`` of ``num_tokens`` tokens; those after the ``covered``
    full blocks are in the tail, which is kept anyway.
    """
    tail = num_tokens - covered * block_size
    return min(max(0, config.recent - tail), covered * block_size)


def floor_pages(
    config: KVCompressConfig, block_size: int, covered: int = 0, own: Wish | None = None
) -> int:
    """Pages that every head keeps: enough for the shields and for ``min_tokens_per_head``.

    Args:
        covered: full blocks that compete.
        own: what the request asked for; its protected positions are a shield, too.
    """
    shields = config.sinks + config.recent
    if own is not None and own.protect:
        shields += own.num_protected(config.sinks, covered * block_size)
    return max(1, -(-max(shields, config.min_tokens_per_head) // block_size))


def fewest_blocks(
    config: KVCompressConfig, block_size: int, covered: int = 0, own: Wish | None = None
) -> int:
    """Blocks that a ratio or a mass keeps at least: room for the floor of every head, and
    ``min_budget_tokens``; arguments as of ``floor_pages``."""
    floor = floor_pages(config, block_size, covered, own)
    return max(floor, -(-config.min_budget_tokens // block_size))


def packed_blocks(
    config: KVCompressConfig,
    num_tokens: int,
    covered: int,
    block_size: int,
    ratio: float | None = None,
    own: Wish | None = None,
) -> int:
    """Blocks C to keep of ``covered`` full blocks of a request of ``num_tokens`` tokens.

    Args:
        ratio: lowers the budget further, down to the fewest blocks.
        own: what the request asked for, within the limits ``min_ratio`` and ``max_ratio``.

    Returns:
        ``covered`` itself where there is nothing to gain: a short prompt, ratio 1, or a budget
        that covers everything.
    """
    if num_tokens < config.min_prompt_tokens:
        return covered
    asked = own
    if own is not None and own.ratio is own.budget_tokens is None:
        own = None
    wanted = own or Wish(config.ratio, config.budget_tokens)
    if wanted.ratio is wanted.budget_tokens is None:
        # A mass of which nothing is known yet.
        wanted = Wish(min(config.max_ratio or math.inf, max(config.min_ratio or 1, DEFAULT_RATIO)))
    if wanted.budget_tokens is not None:
        kept = -(-wanted.budget_tokens // block_size)
        # Who names so few tokens means it.
        fewest = floor_pages(config, block_size, covered, asked)
    else:
        assert wanted.ratio is not None
        fewest = fewest_blocks(config, block_size, covered, asked)
        kept = math.ceil(covered / wanted.ratio)
    if own is not None:
        kept = min(kept, math.ceil(covered / (config.min_ratio or 1.0)))
        if config.max_ratio is not None:
            kept = max(kept, math.ceil(covered / config.max_ratio))
    if ratio is not None:
        kept = min(kept, math.ceil(covered / ratio))
    return min(covered, max(kept, fewest))
