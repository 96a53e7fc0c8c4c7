# SPDX-License-Identifier: Apache-2.0
"""Our attention on the CPU platform where compression is off: each layer's cache on its own."""

from __future__ import annotations

from typing import Any

from kvcompress_vllm.integration.compat.releases import kv_cache_layouts
from kvcompress_vllm.integration.worker.attention import KVCompressBackend


class PlainCpuBackend(KVCompressBackend):
    """Ordinary paged attention. Over the packed layout it would copy the cache in every layer."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        return kv_cache_layouts("LBHNC")
