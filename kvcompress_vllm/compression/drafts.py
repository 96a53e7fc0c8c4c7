# SPDX-License-Identifier: Apache-2.0
"""Layers of a draft model beside those that a policy judges. Letters as in ``cache/layout.py``.

A draft model (EAGLE, https://arxiv.org/abs/2401.15077, or MTP) has attention layers with keys of
the same tokens, in the same blocks. What it drafts is verified, so its keys decide how much is
accepted and never what is answered; they are not worth statistics. Each of their heads keeps the
first keys and the latest, as in StreamingLLM (https://arxiv.org/abs/2309.17453): exactly C pages.
So what the other layers keep is what they would without a draft model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.compression.batch import Batch, Rank
from kvcompress_vllm.records.plan import Compression

Kept = tuple[Tensor, Tensor, Tensor]
"""``kept_pages``, ``kept_first`` and ``kept_keys`` of ``ops.select_pages``."""


def target_rows(
    rank: Rank, state_slot: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int]:
    """State slots and tables of some requests without their draft layers, for the selection.

    Candidates of draft layers come last of a request, so that nothing else changes.

    Args:
        state_slot: ``[R]`` int32.

    Returns:
        What the selection takes from ``state_slot`` to ``page_format``, a state for each request.
    """
    state, layers, scales = rank.state, rank.group.target_layers, rank.state.page_scales
    index = state_slot.clamp(min=0).long()
    own = torch.arange(len(index), dtype=torch.int32, device=index.device)
    return (
        torch.where(state_slot < 0, state_slot, own),
        state.num_pages[index, :layers].contiguous(),
        state.first_page[index, :layers].contiguous(),
        state.covered[index],
        None if scales is None else scales[index, :layers].contiguous(),
        int(state.page_format),
    )


def with_draft_layers(rank: Rank, due: Batch[Compression], kept: Kept) -> Kept:
    """Add what draft layers keep: the first keys that the configuration calls sinks, then the
    latest.

    Args:
        kept: of the other layers, ``[R, L, H]``.
    """
    group, device = rank.group, rank.pages.device
    kept_pages, _, kept_keys = kept
    counts = to_device([item.kept for item in due.items], torch.int32, device)
    shape = len(due.items), group.draft_layers, group.heads
    kept_pages = torch.cat([kept_pages, counts[:, None, None].expand(shape)], 1)
    keys = []
    of_targets = kept_keys.split([item.kept * group.target_heads for item in due.items])
    for item, targets in zip(due.items, of_targets, strict=True):
        candidates = rank.candidate_units(item) * group.block_size
        ours = first_and_latest(candidates, item.kept * group.page_keys, due.sinks, device)
        ours = ours.view(item.kept, group.page_keys)
        keys += [targets, ours.repeat(group.draft_layers * group.heads, 1)]
    first = layout.exclusive_cumsum(kept_pages.flatten(0, 1)).view_as(kept_pages)
    return kept_pages, first, torch.cat(keys)


def first_and_latest(candidates: int, kept: int, num_sinks: int, device: torch.device) -> Tensor:
    """``[kept]`` int32, ascending: which of a head's candidate keys it keeps."""
    sinks = min(num_sinks, kept)
    key = torch.arange(kept, dtype=torch.int32, device=device)
    return torch.where(key < sinks, key, key + (candidates - kept))
