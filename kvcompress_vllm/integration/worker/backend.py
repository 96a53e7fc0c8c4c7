# SPDX-License-Identifier: Apache-2.0
"""Claims vLLM's one CUSTOM attention backend; only in processes where compression is on."""

from __future__ import annotations

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

_BACKEND = "kvcompress_vllm.integration.worker.attention.KVCompressBackend"
_CUDA_BACKEND = "kvcompress_vllm.integration.worker.cuda_attention.KVCompressCudaBackend"


def register() -> AttentionBackendEnum:
    """Register our backend for this platform; idempotent. Returns the name to select it by."""
    backend = _CUDA_BACKEND if current_platform.is_cuda() else _BACKEND
    register_backend(AttentionBackendEnum.CUSTOM, backend)
    return AttentionBackendEnum.CUSTOM
