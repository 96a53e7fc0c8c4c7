# SPDX-License-Identifier: Apache-2.0
"""The ops as ``torch.ops.kvcompress_vllm.*``: schema once, reference as fallback, native on top.

The reference is registered under ``CompositeExplicitAutograd``; ``_C`` and ``_C_cuda`` register CPU
and CUDA kernels of the same signature, which PyTorch's dispatcher then prefers. Arguments are
documented in :mod:`kvcompress_vllm.ops.reference`.

Importing this package loads nothing: the first op that somebody asks for registers them all. So a
process that only reads options or channels pays for no library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvcompress_vllm.ops.channels import (
    ATTENTION_CHANNELS,
    CHANNELS,
    ECHO,
    ENTROPY,
    HEAD_SUM_SQUARES,
    KEY_CHANNELS,
    LAST,
    LIKENESS,
    LOW_COUNT,
    MAXIMUM,
    MEAN_SQUARES,
    NORM,
    STORED_CHANNELS,
    SUM,
    SUM_SQUARES,
    VALUE_NORM,
    channel_mask,
)

if TYPE_CHECKING:
    attention_statistics: Any
    compact_pages: Any
    echo_scores: Any
    fit_scales: Any
    key_statistics: Any
    observe_queries: Any
    paged_attention: Any
    select_pages: Any
    write_kv: Any

_ROWS = "Tensor block_table, Tensor seq_lens, "
_STATE = "Tensor state_slot, Tensor num_pages, Tensor first_page, Tensor covered, "
_STATE += "Tensor? page_scales, int page_format, "
_LOGITS = "*, float soft_cap=0.0, Tensor? sink_logits=None"
SCHEMAS = {
    "write_kv": "(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slot_mapping) -> ()",
    "observe_queries": "(Tensor query, Tensor ring_index, Tensor(a!) ring) -> ()",
    "paged_attention": (
        f"(Tensor query, Tensor pages, {_ROWS}{_STATE}Tensor query_start, int layer, float scale, "
        f"Tensor(a!) out, {_LOGITS}, int decode_query_len=1) -> ()"
    ),
    "attention_statistics": (
        f"(Tensor ring, Tensor pages, {_ROWS}{_STATE}Tensor observe_slot, Tensor num_queries, "
        "Tensor new_covered, Tensor page_start, int num_candidate_pages, int channels, "
        f"int query_stride, float scale, {_LOGITS}) -> Tensor"
    ),
    "key_statistics": (
        f"(Tensor pages, {_ROWS}{_STATE}Tensor new_covered, Tensor page_start, "
        "int num_candidate_pages, int channels) -> Tensor"
    ),
    "echo_scores": (
        f"(Tensor query, Tensor pages, {_ROWS}{_STATE}Tensor segments, Tensor rotation, int layer, "
        "int max_segment, int num_sinks, bool interleaved, float scale, Tensor(a!) scores, "
        f"{_LOGITS}) -> ()"
    ),
    "select_pages": (
        f"(Tensor scores, Tensor page_start, {_STATE}Tensor new_covered, Tensor num_freed, "
        "Tensor num_recent, int num_sinks, int floor_pages, int num_kept_pages) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "fit_scales": (
        f"(Tensor pages, Tensor block_table, {_STATE}Tensor kept_pages, Tensor kept_first, "
        "Tensor kept_keys) -> Tensor"
    ),
    "compact_pages": (
        f"(Tensor(a!) pages, Tensor block_table, {_STATE}Tensor kept_pages, Tensor kept_first, "
        "Tensor kept_keys, Tensor new_blocks, Tensor? new_scales) -> ()"
    ),
}


def backends() -> dict[str, dict[str, bool]]:
    """Which device runs which op natively: ``{"CPU": {op: bool}, "CUDA": {op: bool}}``."""
    import torch

    from kvcompress_vllm.ops import registration  # noqa: F401

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        device: {op: has(f"kvcompress_vllm::{op}", device) for op in SCHEMAS}
        for device in ("CPU", "CUDA")
    }


def missing_kernels(device_type: str) -> str | None:
    """Which ops of "cpu" or "cuda" run on their PyTorch reference, as one line; None if none do."""
    missing = [op for op, native in backends()[device_type.upper()].items() if not native]
    if not missing:
        return None
    needed = "a C++ compiler" + (" and nvcc" if device_type == "cuda" else "")
    return (
        f"no native {device_type} kernel for {', '.join(missing)}: the slower PyTorch reference "
        f"runs; reinstall with {needed} to get them"
    )


CUDA_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 256)
"""As in ``csrc/cuda/launch.h``."""


def cuda_problem(head_size: int, group: int, block_size: int) -> str | None:
    """What the CUDA kernels cannot do of a model's shape, as one line; None: they can do it.

    Args:
        head_size: D.
        group: G, query heads per KV head.
        block_size: B.
    """
    if head_size not in CUDA_HEAD_SIZES:
        sizes = ", ".join(map(str, CUDA_HEAD_SIZES))
        return f"head size {head_size} on a GPU (it must be one of {sizes})"
    if group > 16:
        return f"{group} query heads per KV head on a GPU (at most 16)"
    if block_size < 8 or block_size & (block_size - 1):
        return f"block size {block_size} on a GPU (it must be a power of two from 8 on)"
    return None


def __getattr__(name: str) -> Any:
    if name in SCHEMAS:
        import torch

        from kvcompress_vllm.ops import registration  # noqa: F401

        # So that the next one who asks finds it here.
        return globals().setdefault(name, getattr(torch.ops.kvcompress_vllm, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ATTENTION_CHANNELS",
    "CHANNELS",
    "CUDA_HEAD_SIZES",
    "ECHO",
    "ENTROPY",
    "HEAD_SUM_SQUARES",
    "KEY_CHANNELS",
    "LAST",
    "LIKENESS",
    "LOW_COUNT",
    "MAXIMUM",
    "MEAN_SQUARES",
    "NORM",
    "SCHEMAS",
    "STORED_CHANNELS",
    "SUM",
    "SUM_SQUARES",
    "VALUE_NORM",
    "attention_statistics",
    "backends",
    "channel_mask",
    "compact_pages",
    "cuda_problem",
    "echo_scores",
    "fit_scales",
    "key_statistics",
    "missing_kernels",
    "observe_queries",
    "paged_attention",
    "select_pages",
    "write_kv",
]
