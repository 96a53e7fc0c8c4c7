# SPDX-License-Identifier: Apache-2.0
"""KV cache compression for vLLM. Importing this package patches nothing and imports no vLLM."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kvcompress_vllm.config.options import KVCompressConfig

if TYPE_CHECKING:
    from kvcompress_vllm.integration.frontend.llm import LLM

try:
    __version__ = version("kvcompress_vllm")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["LLM", "KVCompressConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from kvcompress_vllm.integration.frontend.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
