# SPDX-License-Identifier: Apache-2.0
"""KV cache compression for vLLM. Importing this package loads and patches nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress_vllm.config.options import KVCompressConfig
    from kvcompress_vllm.integration.frontend.llm import LLM

    __version__: str

__all__ = ["LLM", "KVCompressConfig", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "KVCompressConfig":
        from kvcompress_vllm.config.options import KVCompressConfig

        return KVCompressConfig
    if name == "LLM":
        from kvcompress_vllm.integration.frontend.llm import LLM

        return LLM
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("kvcompress_vllm")
    except PackageNotFoundError:  # running from a source tree that was never installed
        return "0+unknown"
