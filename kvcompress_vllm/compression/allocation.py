# SPDX-License-Identifier: Apache-2.0
"""How many pages the heads of a request keep: who competes with whom, and for how much.

Letters as in ``cache/layout.py``. The scheduler fixed C; the pages of all heads sum to
``C * L * H`` whatever the policy. An allocator says which heads compete for pages (the selection op
then takes the cheapest pages of each group):

    global     all heads of the request
    layer      the heads of a layer; layers share the budget as the policy wants, else equally
    uniform    none; every head has an equal part of its layer's share

All arithmetic is on the device and waits for nothing. Under tensor parallelism every rank divides
the pages of its own heads: nothing is exchanged, so a rank's share per layer depends on its own
heads alone, and ``global`` on two ranks is not ``global`` on one. A pipeline stage likewise divides
those of its own layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.policies.base import Evidence
from kvcompress_vllm.policies.judge import Shares


def freed_pages(
    kept: Sequence[int],
    allocator: str,
    shares: Shares,
    evidence: Evidence,
    page_keys: int,
    floor_pages: int,
    candidate_pages: int,
    lengths: Tensor | None = None,
) -> Tensor:
    """Pages that each group of competing heads frees, for several C at once.

    Args:
        kept: blocks C, P of them.
        allocator: one of :data:`~kvcompress_vllm.config.options.ALLOCATORS`.
        shares: of the policy, as far as the allocator uses them.
        page_keys: keys that a packed page holds.
        floor_pages: pages that every head keeps.
        candidate_pages: candidate pages that a head has on average.
        lengths: ``[L, H]`` int32 candidate pages of each head; None: as many as the average.

    Returns:
        ``[P, A]`` int32: for each C a row of the selection op's ``num_freed``.

    Raises:
        RuntimeError: a C is below the floor or above what there is.
    """
    layers, heads = evidence.layers, evidence.heads
    full, device = candidate_pages, evidence.device
    wrong = [blocks for blocks in kept if not floor_pages <= blocks <= full]
    if wrong:
        raise RuntimeError(
            f"kv_compress: cannot keep {wrong[0]} of {full} blocks with {floor_pages} per head at "
            "least"
        )
    if allocator == "global":
        freed = [[(full - blocks) * layers * heads] for blocks in kept]
        return to_device(freed, torch.int32, device)
    # Shares are of what the shields leave, as in the papers.
    base = (evidence.num_sinks + evidence.num_recent) / page_keys
    of_layers, within = shares
    if of_layers is None and within is None:
        groups = layers if allocator == "layer" else layers * heads
        each = [[(full - blocks) * layers * heads // groups] for blocks in kept]
        return to_device(each, torch.int32, device).expand(-1, groups)
    if lengths is None:
        lengths = torch.full((layers, heads), full, dtype=torch.int32, device=device)
    if of_layers is None:
        of_layers = torch.ones(layers, dtype=torch.float64, device=device)
    of_layers = of_layers.expand(len(kept), -1)
    total = to_device(kept, torch.int64, device) * layers
    if allocator == "uniform":
        # In blocks per head, so that the heads of a layer are exactly equal, as they always were.
        pages = water_fill(of_layers, total, floor_pages, lengths.amin(-1), base)
        return (lengths - pages.unsqueeze(-1)).flatten(1).int()
    candidates = lengths.sum(-1)
    per_layer = water_fill(of_layers, total * heads, floor_pages * heads, candidates, base * heads)
    if within is None:
        return (candidates - per_layer).int()
    within = within.expand(len(kept), -1, -1)
    return (lengths - water_fill(within, per_layer, floor_pages, lengths, base)).flatten(1).int()


def water_fill(weights: Tensor, total: Tensor, low: int, high: Tensor, base: float) -> Tensor:
    """Divide ``total`` units by weight: ``base + level * weight``, cut to ``[low, high]``.

    What cutting adds or takes moves the level for the others, so the sum is exact. Fractions are
    rounded by largest remainder, ties to the first.

    Args:
        weights: ``[..., A]`` >= 0; all zero, or not finite, means equal.
        total: ``[...]`` integers between the sums of the bounds.
        low: least of every part; ``base <= low``.
        high: ``[..., A]`` integers, most of each part.

    Returns:
        ``[..., A]`` int64, summing to ``total`` along the last dimension.
    """
    weights = weights.double().clamp(min=0).nan_to_num(nan=0.0, posinf=0.0)
    largest = weights.amax(-1, keepdim=True)
    weights = torch.where(largest > 0, weights / largest, 1.0)
    # A weight of nothing still takes what no other part has room for.
    weights = weights.clamp(min=1e-9)
    wanted, high = total.double()[..., None], high.double()

    def filled(level: Tensor) -> Tensor:
        """``[..., K, A]`` for levels ``[..., K]``."""
        parts = (base + level[..., None] * weights[..., None, :]).clamp(min=low)
        return torch.minimum(parts, high[..., None, :])

    # The sum grows with the level and bends where a part leaves `low` or reaches `high`.
    bends = torch.cat([(low - base) / weights, (high - base) / weights], -1).sort(-1).values
    sums = filled(bends).sum(-1)
    below = ((sums <= wanted).sum(-1, keepdim=True) - 1).clamp(min=0)
    above = (below + 1).clamp(max=bends.shape[-1] - 1)
    x0, x1 = bends.gather(-1, below), bends.gather(-1, above)
    y0, y1 = sums.gather(-1, below), sums.gather(-1, above)
    rise = (y1 - y0).clamp(min=torch.finfo(torch.float64).tiny)
    level = x0 + (x1 - x0) * ((wanted - y0) / rise).clamp(0, 1)
    parts = filled(level).squeeze(-2)
    # What should be an integer is one, so that rounding errors decide no remainder.
    nearest = parts.round()
    parts = torch.where((parts - nearest).abs() < 1e-6, nearest, parts)
    whole = parts.floor()
    left = wanted - whole.sum(-1, keepdim=True)
    order = (parts - whole).argsort(stable=True, dim=-1, descending=True)
    rank = order.argsort(-1)
    result: Tensor = (whole + (rank < left)).long()
    return result
