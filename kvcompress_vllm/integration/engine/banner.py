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
    packing, page_dtype = planner.sizes().packed(length), planner.config.page_dtype
    packed = packing.held(full)
    share = min(1, packing.kept * planner.sizes().blocks_per_page / max(1, packing.covered))
    logger.info("kv_compress: %s", planner.config)
    logger.info(
        "kv_compress: %d blocks of %d tokens; a prompt of %d tokens takes %d blocks, %d once "
        "compressed, with %.0f%% of its keys%s: room for %.1f such requests instead of %.1f",
        blocks,
        planner.block_size,
        length,
        full,
        packed,
        100 * share,
        "" if page_dtype == "auto" else f" in {page_dtype}",
        blocks / max(1, packed),
        blocks / full,
    )
