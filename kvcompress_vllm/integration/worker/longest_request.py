# SPDX-License-Identifier: Apache-2.0
"""Whether the KV cache can hold the longest request alone; vLLM's own answer knows of no way out
that compression offers."""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec
from vllm.v1.worker.gpu_worker import Worker

from kvcompress_vllm.integration.compat.releases import cache_groups
from kvcompress_vllm.integration.engine.groups import compressed_group
from kvcompress_vllm.integration.start.flags import KEY, resolved_config

LEAST_PEAK = 256
"""The smallest accepted ``prefill_peak_tokens``, and the steps in which one is looked for."""
RATIOS = (2, 3, 4, 6, 8, 12, 16)
"""Among which a ``min_ratio`` is looked for."""


class LongestRequestMixin(Worker):
    """Before all other parts of a worker: looks at the memory that they found."""

    def determine_available_memory(self) -> int:
        available = super().determine_available_memory()
        if available > 0:  # else vLLM says what to do
            groups = cache_groups(self.vllm_config, self.get_kv_cache_spec())
            check_longest_request(self.vllm_config, groups, available)
        return available


def check_longest_request(
    vllm_config: VllmConfig, groups: list[KVCacheGroupSpec], available: int
) -> None:
    """Refuse a KV cache that is smaller than what one request may need.

    Args:
        groups: all of vLLM's cache groups.
        available: bytes.

    Raises:
        ValueError: with both numbers in blocks, and what helps.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    specs = [group.kv_cache_spec for group in groups]
    compressed_group(specs)  # else vLLM's numbers mean something else
    layers = max(len(group.layer_names) for group in groups)
    blocks = available // (layers * specs[0].page_size_bytes)
    if cache.num_gpu_blocks_override is not None:
        blocks = cache.num_gpu_blocks_override
    if model.original_max_model_len == -1:
        return  # vLLM takes what fits
    needed = _blocks_needed(vllm_config, specs)
    if needed <= blocks:
        return
    raise ValueError(
        f"kv_compress: the KV cache has {blocks} blocks of {cache.block_size} tokens, and a "
        f"request of max_model_len={model.max_model_len} tokens may need {needed}; "
        f"{_ways_out(vllm_config, specs, blocks)}, reduce --max-model-len, or enlarge the cache "
        "(--gpu-memory-utilization, --kv-cache-memory-bytes, --num-gpu-blocks-override)"
    )


def _ways_out(vllm_config: VllmConfig, specs: list[KVCacheSpec], blocks: int) -> str:
    """Options of compression with which the longest request fits, or may fit."""
    config = resolved_config(vllm_config)
    assert config is not None
    peak = _peak_that_fits(vllm_config, specs, blocks)
    if peak is not None:
        return (
            f"give --kv-compress-prefill-peak-tokens {peak}, with which longer prompts are "
            "compressed while they are read"
        )
    if config.budget_tokens is not None:
        return "keep less (fewer budget_tokens)"
    if config.mass is None:
        return "keep less (a higher ratio)"
    trial = copy.copy(vllm_config)
    for least in RATIOS:
        if not (config.min_ratio or 1) < least <= (config.max_ratio or RATIOS[-1]):
            continue
        trial.additional_config = {KEY: {**vllm_config.additional_config[KEY], "min_ratio": least}}  # type: ignore[index]
        more = ""
        if config.prefill_peak_tokens is None:
            peak = _peak_that_fits(trial, specs, blocks)
            more = f" and --kv-compress-prefill-peak-tokens {peak}"
        if peak is not None or _blocks_needed(trial, specs) <= blocks:
            return f"give --kv-compress-min-ratio {least}{more}: a mass alone may keep every key"
    return "keep less (a higher min_ratio: a mass alone may keep every key)"


def _blocks_needed(vllm_config: VllmConfig, specs: list[KVCacheSpec]) -> int:
    return sum(
        -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs
    )


def _peak_that_fits(vllm_config: VllmConfig, specs: list[KVCacheSpec], blocks: int) -> int | None:
    """The largest ``prefill_peak_tokens`` with which the longest request fits; None: there is none,
    or another one is set already."""
    options: dict[str, Any] = dict(vllm_config.additional_config[KEY])  # type: ignore[index]
    if options.get("prefill_peak_tokens") is not None:
        return None
    most = blocks * vllm_config.cache_config.block_size // LEAST_PEAK * LEAST_PEAK
    trial = copy.copy(vllm_config)
    for peak in range(most, 0, -LEAST_PEAK):
        trial.additional_config = {KEY: {**options, "prefill_peak_tokens": peak}}
        if _blocks_needed(trial, specs) <= blocks:
            return peak
    return None
