# SPDX-License-Identifier: Apache-2.0
"""What every op means, in plain PyTorch. Letters as in ``cache/layout.py``.

These functions are the specification that the native kernels are tested against, and what runs
where no kernel was built. They loop over (request, layer, head), never over tokens.

Several ops describe the same rows, always by the same six tensors:

    block_table [R, M] int32   block ids, logical length (see layout.py)
    seq_lens    [R]    int32   tokens of the request whose K/V is in the cache
    state_slot  [R]    int32   row of the three state tables, -1: not packed
    num_pages   [U, L, H] int32, first_page [U, L, H] int32, covered [U] int32 (F)
    page_scales [U, L, H, A, S] bf16, what codes in packed pages stand for; None with format auto
    page_format how packed pages hold keys, see page_format.py: T keys each, m = T / B
"""

from __future__ import annotations

from collections.abc import Callable

from kvcompress_vllm.ops.reference.attention import paged_attention
from kvcompress_vllm.ops.reference.compaction import compact_pages, empty_scales, fit_scales
from kvcompress_vllm.ops.reference.echo import echo_scores, rotated
from kvcompress_vllm.ops.reference.selection import empty_selection, select_pages
from kvcompress_vllm.ops.reference.statistics import (
    attention_statistics,
    empty_statistics,
    key_statistics,
)
from kvcompress_vllm.ops.reference.writes import observe_queries, write_kv

RESULTS: dict[str, Callable[..., object]] = {
    "attention_statistics": lambda _, pages, *rest, **_logits: empty_statistics(
        pages, *rest[-4:-2]
    ),
    "key_statistics": lambda pages, *rest: empty_statistics(pages, *rest[-2:]),
    "select_pages": empty_selection,
    "fit_scales": empty_scales,
}
"""What ops return that return something, by shape: ``torch.compile`` asks with no values."""

__all__ = [
    "RESULTS",
    "attention_statistics",
    "compact_pages",
    "echo_scores",
    "fit_scales",
    "key_statistics",
    "observe_queries",
    "paged_attention",
    "rotated",
    "select_pages",
    "write_kv",
]
