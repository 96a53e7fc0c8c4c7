# SPDX-License-Identifier: Apache-2.0
"""What packed pages hold, once the model and its cache are known."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.config.auto import PREFERRED_PAGES
from kvcompress_vllm.integration.start.attention_kinds import has_states
from kvcompress_vllm.integration.start.carried import Carried
from kvcompress_vllm.integration.start.flags import KEY, resolved_config

logger = init_logger("vllm.kv_compress")


def choose(vllm_config: VllmConfig) -> None:
    """Set ``page_dtype`` where the user did not, to what this cache can have.

    Raises:
        ValueError: the user did, and it cannot.
    """
    config = resolved_config(vllm_config)
    if config is None:
        return
    wanted = PageFormat.of(config.page_dtype or PREFERRED_PAGES)
    found = problem(vllm_config, wanted)
    if config.page_dtype is not None:
        if found is not None:
            raise ValueError(f"kv_compress: {found}; page_dtype=auto works with every model")
        return
    if found is not None:
        logger.info("kv_compress: page_dtype=auto, for %s", found)
        wanted = PageFormat.AUTO
    # Not into the dictionary that is there: the caller may use it for another model.
    options = {**config.to_dict(), "page_dtype": wanted.label}
    others: Any = vllm_config.additional_config
    vllm_config.additional_config = {**others, KEY: Carried(options)}


def problem(vllm_config: VllmConfig, page_format: PageFormat) -> str | None:
    """Why the cache cannot have such pages; None: it can."""
    if page_format is not PageFormat.AUTO and has_states(vllm_config):
        return (
            f"page_dtype={page_format.label!r} is not accepted with layers that keep a state in "
            "the place of keys"
        )
    return page_format.problem(vllm_config.model_config.get_head_size(), cache_dtype(vllm_config))


def cache_dtype(vllm_config: VllmConfig) -> torch.dtype:
    """Of the KV cache; bytes where it is quantised."""
    given: Any = vllm_config.cache_config.cache_dtype
    dtype: Any = getattr(torch, given, None)
    if given == "auto":
        dtype = vllm_config.model_config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.uint8
