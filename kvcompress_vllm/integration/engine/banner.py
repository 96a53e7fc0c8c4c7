# SPDX-License-Identifier: Apache-2.0
"""What the engine's log says at startup."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.config import SchedulerConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from kvcompress_vllm.integration.engine.groups import OtherGroups
from kvcompress_vllm.integration.sizing import few_heads, step_tokens
from kvcompress_vllm.scheduling.planner import CompressionPlanner
from kvcompress_vllm.scheduling.segments import SEGMENT

logger = init_logger("vllm.kv_compress")


def log_banner(
    planner: CompressionPlanner,
    blocks: int,
    groups: Sequence[KVCacheGroupSpec],
    others: OtherGroups,
) -> None:
    """Log the resolved configuration, and how many of the longest prompts fit.

    Args:
        blocks: of the pool, without the null block.
        groups: all of vLLM's cache groups.
        others: those that are not compressed.
    """
    length = planner.limits.max_tokens
    beside = others.decoding(length)
    full = -(-length // planner.block_size) + beside
    packing, page_dtype = planner.sizes().packed(length), planner.config.page_format.label
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
    spec: Any = groups[others.index].kv_cache_spec
    drafts = getattr(spec, "draft_layers", 0)
    few = few_heads(len(groups[others.index].layer_names) - drafts, spec.num_kv_heads)
    if few is not None and packing.gains and share < 1:
        logger.warning("kv_compress: %s", few)
    if drafts:
        logger.info(
            "kv_compress: %d of %d layers are the draft model's: they keep the first keys and the "
            "latest",
            drafts,
            len(groups[others.index].layer_names),
        )
    if others:
        layers = [len(group.layer_names) for group in groups]
        logger.info(
            "kv_compress: %d of %d layers have full attention and are compressed; the others hold "
            "%d of those blocks, and what requests have in common is not shared packed",
            layers[others.index],
            sum(layers),
            beside,
        )


def warn_of_small_steps(config: SchedulerConfig, drafts: int = 0) -> None:
    """Warn where steps may not have room for the tokens that get echo scores at once.

    Args:
        drafts: tokens that a step computes of a generation beyond its next.
    """
    tokens, requests = step_tokens(config), config.max_num_seqs
    if tokens - requests * (1 + drafts) < SEGMENT:
        logger.warning(
            "kv_compress: steps of %d tokens with up to %d requests of %d tokens may not have room "
            "for the %d tokens that are scored at once: what is kept then depends on how "
            "prompts are cut, and the prefix cache is used less; raise "
            "--max-num-batched-tokens",
            tokens,
            requests,
            1 + drafts,
            SEGMENT,
        )
