# SPDX-License-Identifier: Apache-2.0
"""How much of everything an engine has; scheduler and workers must compute the same numbers."""

from __future__ import annotations

from vllm.config import SchedulerConfig, VllmConfig

from kvcompress_vllm.integration.compat.releases import sequences_at_a_time
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.scheduling.observation import check_room, check_steps
from kvcompress_vllm.scheduling.slots import num_context_slots, num_observe_slots


def observe_slots(vllm_config: VllmConfig, group: CacheGroup, num_blocks: int) -> int:
    """Observation slots of an engine whose pool has ``num_blocks`` blocks."""
    config = resolved_config(vllm_config)
    assert config is not None
    scheduler = vllm_config.scheduler_config
    return num_observe_slots(
        config,
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
        num_blocks * group.kernel_blocks,
        group,
        draft_tokens(vllm_config),
    )


def draft_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of a generation beyond its next that may be computed, or that vLLM keeps room for,
    while it is not known whether they are accepted."""
    drafts: int = vllm_config.num_speculative_tokens
    if not drafts:
        return 0
    speculative = vllm_config.speculative_config
    assert speculative is not None
    # Those of a step; where a draft model writes keys of those of the next; those that a step in
    # flight may still reject.
    parts = 1 + speculative.use_eagle() + bool(vllm_config.scheduler_config.async_scheduling)
    return parts * drafts


def context_slots(vllm_config: VllmConfig, num_blocks: int) -> int:
    """State slots of an engine for packed prefixes that requests share: they come after those of
    requests. 0 where vLLM caches no prefixes."""
    caches = vllm_config.cache_config.enable_prefix_caching
    return num_context_slots(num_blocks) if caches else 0


def state_slots(vllm_config: VllmConfig, num_blocks: int) -> int:
    """All state slots of an engine whose KV cache has ``num_blocks`` blocks."""
    requests: int = vllm_config.scheduler_config.max_num_seqs
    return requests + context_slots(vllm_config, num_blocks)


def step_tokens(scheduler_config: SchedulerConfig) -> int:
    """Tokens of one request that a step computes at most."""
    threshold = scheduler_config.long_prefill_token_threshold
    most = all_step_tokens(scheduler_config)
    return min(most, threshold) if threshold > 0 else most


def all_step_tokens(scheduler_config: SchedulerConfig) -> int:
    """Tokens of all requests that a step computes at most."""
    fewer: int | None = scheduler_config.max_num_scheduled_tokens
    most: int = scheduler_config.max_num_batched_tokens
    return most if fewer is None else min(most, fewer)


def check_step_sizes(vllm_config: VllmConfig, block_size: int) -> None:
    """Refuse steps in which what is observed could not go on; see ``scheduling/observation.py``.

    Raises:
        ValueError: with the numbers and what is accepted.
    """
    config, scheduler = resolved_config(vllm_config), vllm_config.scheduler_config
    assert config is not None
    check_steps(config, block_size, step_tokens(scheduler))
    check_room(
        config,
        block_size,
        all_step_tokens(scheduler),
        sequences_at_a_time(scheduler),
        1 + vllm_config.num_speculative_tokens,
    )


FEW_HEADS = 8
"""Heads below which a budget that they share leaves little to choose from. Of two models that were
measured one has 90 and keeps its answers at half of its keys, the other 3 and loses a third."""


def few_heads(layers: int, heads: int) -> str | None:
    """What to tell who compresses a model with few heads; None: it has enough.

    Args:
        layers: compressed ones.
        heads: KV heads of each, on one rank.
    """
    if layers * heads >= FEW_HEADS:
        return None
    return (
        f"only {layers * heads} heads ({layers} layers of {heads}) share the budget of a request, "
        "so that every key that is dropped costs more answers than in other models; "
        "page_dtype=fp8 drops none up to ratio 2, page_dtype=int4 up to 4 (docs/quality.md)"
    )
