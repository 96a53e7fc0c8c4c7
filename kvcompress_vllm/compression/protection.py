# SPDX-License-Identifier: Apache-2.0
"""Where the protected ranges of packed requests are. Letters as in ``cache/layout.py``.

A request names positions that are never evicted. Positions of packed keys are not kept; but a
range loses no key, so its keys stay neighbours, and one number per head says where it begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.records.plan import Judged


class Protected:
    """Follows protected ranges through compressions.

    Args:
        state: this rank's tables; read before a compression is installed in them.
    """

    def __init__(self, state: PackedState) -> None:
        self._state, self._block_size = state, state.group.block_size
        self._begin: dict[int, list[Tensor]] = {}
        """By state slot: for every range that begins in the packed part, ``[L * H]`` int64, its
        first key in each head."""

    def shield(self, item: Judged, scores: Tensor) -> Tensor:
        """Scores with +inf where a range is.

        Args:
            scores: ``[L * H, n]`` fp32 of the candidates, heads at the right edge.
        """
        column = torch.arange(scores.shape[1], device=scores.device)
        # No head may be as long as the request: columns count from where the longest begins.
        indent = self._indent(item) - item.covered * self._block_size + scores.shape[1]
        for (start, end), begin in zip(item.protect, self._candidates(item), strict=False):
            # From the index in the head to the column; heads that kept fewer keys start later.
            first = (begin + indent)[:, None]
            length = min(end, item.covered * self._block_size) - start
            scores = scores.masked_fill((column >= first) & (column < first + length), float("inf"))
        return scores

    def moved(self, item: Judged, kept_keys: Tensor, kept_pages: Tensor) -> None:
        """Note where the ranges are after a compression; call before it is installed.

        Args:
            kept_keys: ``[C * L * H, T]`` int32 from the selection op, of this request; L is without
                draft layers, which protect nothing.
            kept_pages: ``[L, H]`` int32.
        """
        pages = kept_keys.shape[0]
        counts = kept_pages.flatten().long()
        head = torch.arange(counts.shape[0], device=counts.device)
        head = head.repeat_interleave(counts, output_size=pages)
        moved = []
        for begin in self._candidates(item):
            before = (kept_keys < begin[head, None]).sum(-1)
            moved.append(torch.zeros_like(counts).index_add_(0, head, before))
        self._begin[item.state_slot] = moved

    def _candidates(self, item: Judged) -> list[Tensor]:
        """Of every range that begins among the candidates, ``[L * H]`` int64 first key index."""
        packed = item.old_covered * self._block_size if item.old_kept else 0
        # Those who share a context agree on these only; others of theirs begin behind it.
        shared = sum(start < packed for start, _ in item.protect)
        known = self._begin[item.packed_slot] if shared else []
        shift = self._indent(item)
        fresh = [
            start - shift
            for start, _ in item.protect[len(known) :]
            if start < item.covered * self._block_size
        ]
        return [*known, *fresh]

    def _indent(self, item: Judged) -> Tensor:
        """``[L * H]`` int64: tokens whose key a head has lost, up to its packed part's end."""
        layers = self._state.group.target_layers
        pages = self._state.num_pages[item.packed_slot, :layers].flatten().long()
        if not item.old_kept:
            return torch.zeros_like(pages)
        m = self._state.group.blocks_per_page
        return (item.old_covered - pages * m) * self._block_size
