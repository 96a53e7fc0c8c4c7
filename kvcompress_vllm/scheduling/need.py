# SPDX-License-Identifier: Apache-2.0
"""The one rule of what is accepted: a request is, if it is sure to finish alone in an empty pool.

Without ``prefill_peak_tokens`` the pool must hold the longest request whole. With it, only what a
request holds at any time, and beside that the copy that a compression makes before it gives the old
blocks back. A request that is preempted starts anew with its output as part of the prompt, so the
bound is for any prefill up to the request's greatest length.
"""

from __future__ import annotations

from kvcompress_vllm.scheduling.sizes import Sizes

SLACK_BLOCKS = 2
"""For ends of tokens that do not fill a block, and tokens decoded while a loss curve comes back."""


def blocks_needed(sizes: Sizes, window: int, num_tokens: int, drafts: int = 0) -> int:
    """Blocks with which a request that reaches ``num_tokens`` tokens is sure to finish alone.

    Args:
        sizes: of its budget.
        window: tokens for which a generation is observed before it is compressed.
        drafts: tokens beyond those that a step may compute, some to be rejected.
    """
    num_tokens, window = num_tokens + drafts, window + drafts
    block_size, peak = sizes.limits.block_size, sizes.limits.peak_blocks
    everything, covered = -(-num_tokens // block_size), sizes.covered(num_tokens)
    m = sizes.blocks_per_page
    if peak is None or not sizes.limits.decode:
        return everything
    most, floor = sizes.budget.most_blocks(num_tokens, block_size), sizes.floor(covered)
    if most >= covered or floor + m > peak:
        return everything  # it is never compressed, or no interruption would give a block back
    short = -(-sizes.budget.min_prompt_tokens // (block_size * m)) * m
    # Read within the peak, with a copy of what interrupts it or of what the prompt keeps. Or too
    # short to be compressed, or within its budget, up to the end of a packed page.
    prefill = max(peak + max(min(most, peak), floor), most + m)
    # Packed as its context, it grows by as much again.
    shared = 0 if sizes.context is None else min(most, sizes.packed(sizes.context).kept)
    # Grown by the interval, or just long enough to be compressed, and late by a window.
    outgrown = most + sizes.limits.interval + shared + m - 1
    decode = max(outgrown, short) + most + -(-window // block_size)
    return min(everything, max(prefill, decode) + SLACK_BLOCKS)
