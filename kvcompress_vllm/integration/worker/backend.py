# SPDX-License-Identifier: Apache-2.0
"""Claims vLLM's one CUSTOM attention backend; only in processes where compression is on.

Only layers with full attention run on it. Those with a window or chunks, which stand beside them,
run on vLLM's own.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

_BACKEND = "kvcompress_vllm.integration.worker.attention.KVCompressBackend"
_CUDA_BACKEND = "kvcompress_vllm.integration.worker.cuda_attention.KVCompressCudaBackend"


_PATCHED = "_kv_compress"
_LOCAL = "sliding_window"
"""Kind of a layer that sees a part of the context, as vLLM's ``backend_per_kind`` spells it."""


def register() -> AttentionBackendEnum:
    """Register our backend for this platform; idempotent. Returns the name to select it by."""
    backend = _CUDA_BACKEND if current_platform.is_cuda() else _BACKEND
    register_backend(AttentionBackendEnum.CUSTOM, backend)
    return AttentionBackendEnum.CUSTOM


def leave_local_layers(vllm_config: Any) -> None:
    """Have vLLM run layers with a window on FlashAttention; on CPU the platform decides.

    Raises:
        ValueError: the user wants layers with full attention on another backend than ours.
    """
    chosen = vllm_config.attention_config.backend_per_kind
    other = chosen.get("full_attention", AttentionBackendEnum.CUSTOM)
    if other is not AttentionBackendEnum.CUSTOM:
        raise ValueError(
            f"kv_compress: attention_config.backend_per_kind has full_attention={other.name}; with "
            "--kv-compress that must be left out"
        )
    if current_platform.is_cuda():
        chosen.setdefault(_LOCAL, AttentionBackendEnum.FLASH_ATTN)


def take_draft_layers(vllm_config: Any) -> None:
    """Have vLLM run a draft model's layers on our backend, as they share blocks with the target's.
    Runner V1 asks for a backend of their own else.

    Raises:
        ValueError: the user wants them on another.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method == "ngram":
        return
    given = speculative.attention_backend
    if given not in (None, AttentionBackendEnum.CUSTOM):
        raise ValueError(
            f"kv_compress: --speculative-config has attention_backend={given.name}; with "
            "--kv-compress that must be left out"
        )
    speculative.attention_backend = AttentionBackendEnum.CUSTOM


def tell_chunks_from_full_attention() -> None:
    """Have vLLM choose the backend of layers with chunks as for those with a window; idempotent.

    It asks for one as if they had full attention: they would get ours, which would not know of
    them, and their cache would be read as if it were packed.
    """
    from vllm.model_executor.layers.attention import chunked_local_attention

    module: Any = chunked_local_attention
    stock = module.get_attn_backend
    if getattr(stock, _PATCHED, False):
        return

    @functools.wraps(stock)
    def get_attn_backend(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **{**kwargs, "has_sliding_window": True})

    setattr(get_attn_backend, _PATCHED, True)
    module.get_attn_backend = get_attn_backend
