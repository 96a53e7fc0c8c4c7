# SPDX-License-Identifier: Apache-2.0
"""What the engine's log says at startup."""

from __future__ import annotations

from vllm.config import SchedulerConfig
from vllm.logger import init_logger

from kvcompress_vllm.integration.sizing import step_tokens
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.segments import SEGMENT

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
    stored = f" in {page_dtype}" if page_dtype != "auto" and packing.gains else ""
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
        stored,
        blocks / max(1, packed),
        blocks / full,
    )


def warn_of_small_steps(config: SchedulerConfig) -> None:
    """Warn where steps may not have room for the tokens that get echo scores at once."""
    tokens, requests = step_tokens(config), config.max_num_seqs
    if tokens - requests < SEGMENT:
        logger.warning(
            "kv_compress: steps of %d tokens with up to %d requests may not have room for "
            "the %d tokens that are scored at once: what is kept then depends on how "
            "prompts are cut, and the prefix cache is used less; raise "
            "--max-num-batched-tokens",
            tokens,
            requests,
            SEGMENT,
        )
