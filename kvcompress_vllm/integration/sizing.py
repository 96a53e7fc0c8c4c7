# SPDX-License-Identifier: Apache-2.0
"""How much of everything an engine has; scheduler and workers must compute the same numbers."""

from __future__ import annotations

from vllm.config import SchedulerConfig, VllmConfig

from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.scheduling.slots import num_observe_slots


def observe_slots(vllm_config: VllmConfig, group: CacheGroup, num_blocks: int) -> int:
    """Observation slots of an engine whose KV cache has ``num_blocks`` blocks."""
    config = resolved_config(vllm_config)
    assert config is not None
    scheduler = vllm_config.scheduler_config
    return num_observe_slots(
        config,
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
        num_blocks,
        group,
    )


def step_tokens(scheduler_config: SchedulerConfig) -> int:
    """Tokens of one request that a step computes at most."""
    threshold = scheduler_config.long_prefill_token_threshold
    most: int = scheduler_config.max_num_batched_tokens
    return min(most, threshold) if threshold > 0 else most
