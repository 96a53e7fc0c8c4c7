# SPDX-License-Identifier: Apache-2.0
"""Plans in kernel blocks, where a block of vLLM's pool has several (decision 033).

The scheduler counts what the pool hands out. Workers read and write pages, of which a block has one
for each head and kernel block; kernel block i of block n is n * k + i, as vLLM has it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

from kvcompress_vllm.records.plan import Accumulation, Compression, StepPlan

Item = TypeVar("Item", bound=Accumulation)


def split(blocks: Iterable[int], k: int) -> list[int]:
    """Ids of the kernel blocks of some blocks, in order."""
    return [block * k + i for block in blocks for i in range(k)]


def in_kernel_blocks(plan: StepPlan, k: int) -> StepPlan:
    """The same plan for a worker; ``plan`` itself is left alone, as others may read it.

    Args:
        k: kernel blocks of a block.

    Raises:
        RuntimeError: it has repetitions of contexts, which are not planned where ``k`` is not 1.
    """
    if k == 1:
        return plan
    if plan.replays:
        raise RuntimeError(f"kv_compress: a context is repeated in blocks of {k} kernel blocks")
    expected = plan.expected
    if expected is not None:
        expected = [
            row._replace(covered=row.covered * k, packed_blocks=split(row.packed_blocks, k))
            for row in expected
        ]
    return replace(
        plan,
        accumulations=[_split(item, k) for item in plan.accumulations],
        scorings=[replace(_split(item, k), kept=item.kept * k) for item in plan.scorings],
        compressions=[_split_compression(item, k) for item in plan.compressions],
        heard=[item._replace(blocks=split(item.blocks, k)) for item in plan.heard],
        expected=expected,
    )


def _split(item: Item, k: int) -> Item:
    observed = item.observed
    return replace(
        item,
        old_covered=item.old_covered * k,
        old_kept=item.old_kept * k,
        covered=item.covered * k,
        old_blocks=split(item.old_blocks, k),
        observed=None if observed is None else observed._replace(known=observed.known * k),
    )


def _split_compression(item: Compression, k: int) -> Compression:
    return replace(_split(item, k), new_blocks=split(item.new_blocks, k))
