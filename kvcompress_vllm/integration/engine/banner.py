# SPDX-License-Identifier: Apache-2.0
"""What the engine's log says at startup."""

from __future__ import annotations

from vllm.logger import init_logger

from kvcompress_vllm.scheduling.planner import CompressionPlanner

logger = init_logger("vllm.kv_compress")


def log_banner(planner: CompressionPlanner, blocks: int) -> None:
    """Log the resolved configuration, and how many of the longest prompts fit.

    Args:
        blocks: of the pool, without the null block.
    """
    length = planner.limits.max_tokens
    full = -(-length // planner.block_size)
    packed = planner.sizes().packed(length).held(full)
    logger.info("kv_compress: %s", planner.config)
    logger.info(
        "kv_compress: %d blocks of %d tokens; a prompt of %d tokens takes %d blocks, %d once "
        "compressed: room for %.1f such requests instead of %.1f",
        blocks,
        planner.block_size,
        length,
        full,
        packed,
        blocks / max(1, packed),
        blocks / full,
    )
