# SPDX-License-Identifier: Apache-2.0
"""What an engine's configuration says of all its requests, in blocks."""

from __future__ import annotations

from typing import NamedTuple

from kvcompress_vllm.config.options import KVCompressConfig


class Limits(NamedTuple):
    """What holds for all requests of an engine."""

    block_size: int
    """B, tokens per block."""
    max_tokens: int
    """Longest possible request, prompt and output."""
    interval: int
    """Blocks by which a generation outgrows its budget before it is compressed again."""
    decode: bool
    """Whether generations are compressed."""
    peak_blocks: int | None
    """Blocks that a request may hold during its prefill; None: all of them."""
    window: int
    """Queries that are observed before a compression."""
    kernel_blocks: int = 1
    """Kernel blocks of a block, each a page of every head."""

    @classmethod
    def of(
        cls, config: KVCompressConfig, block_size: int, max_tokens: int, kernel_blocks: int = 1
    ) -> Limits:
        """Those of a configuration; its ``interval`` is in kernel blocks."""
        peak = config.prefill_peak_tokens
        blocks = None if peak is None else peak // block_size
        interval = -(-config.interval // kernel_blocks)
        window = config.window
        return cls(block_size, max_tokens, interval, config.decode, blocks, window, kernel_blocks)
