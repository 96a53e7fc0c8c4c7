# SPDX-License-Identifier: Apache-2.0
"""Invariants of the block pool and of the packed pages, checked in tests and on demand.

Set ``KVCOMPRESS_CHECK_INTEGRITY=1`` to check after every scheduling step and before every forward;
it walks the whole pool, so it is for debugging. Every violation is a ``RuntimeError`` with the
numbers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch

from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.config.rules import printable
from kvcompress_vllm.records.plan import PackedRow

ROUNDING = 1e-4
"""By which a probability may exceed 1: kernels divide rounded exponentials by their rounded sum."""


def enabled() -> bool:
    """Whether the debug switch is on."""
    return os.environ.get("KVCOMPRESS_CHECK_INTEGRITY", "0") not in ("", "0")


class Block(NamedTuple):
    """One block of the pool as the scheduler sees it."""

    ref_count: int
    is_null: bool
    is_hashed: bool


def check_pool(
    blocks: Sequence[Block],
    free: Sequence[int],
    rows: Mapping[str, Sequence[int]],
    packed: Mapping[str, tuple[int, int]],
    held: Mapping[int, int] | None = None,
    shared: Collection[int] = (),
) -> None:
    """Check the scheduler's view: every block is free, null, or owned as its count says.

    Args:
        blocks: by block id.
        free: ids in the free queue.
        rows: block ids of every request.
        packed: (F, C) of every packed request.
        held: further references to blocks (frees deferred until a step is done).
        shared: packed blocks of contexts, which several requests may hold.

    Raises:
        RuntimeError: a block is lost, freed twice, over- or under-counted, or a packed row is not
            packed blocks, null blocks and a tail.
    """
    owners = Counter(block for row in rows.values() for block in row)
    owners.update(held or {})
    free_count = Counter(free)
    for index, block in enumerate(blocks):
        if block.is_null:
            if free_count[index]:
                raise RuntimeError(f"kv_compress: null block {index} is in the free queue")
            continue
        if block.ref_count != owners[index]:
            raise RuntimeError(
                f"kv_compress: block {index} has reference count {block.ref_count} "
                f"but {owners[index]} owners"
            )
        if free_count[index] != (block.ref_count == 0):
            raise RuntimeError(
                f"kv_compress: block {index} with reference count {block.ref_count} "
                f"is {free_count[index]} times in the free queue"
            )
    for request, (covered, kept) in packed.items():
        row = rows.get(request)
        if row is None:
            raise RuntimeError(f"kv_compress: packed request {request} holds no blocks")
        shape = [blocks[block].is_null for block in row]
        if shape != [False] * kept + [True] * (covered - kept) + [False] * (len(row) - covered):
            raise RuntimeError(
                f"kv_compress: row of {request} with F={covered}, C={kept} has null "
                f"blocks at {[i for i, null in enumerate(shape) if null]} of "
                f"{len(row)}"
            )
        front = set(row[:kept])
        if front & set(shared):
            if not front <= set(shared):
                raise RuntimeError(
                    f"kv_compress: of the packed blocks {row[:kept]} of {request} only some are "
                    "those of a context"
                )
            continue
        for index in row[:kept]:
            if blocks[index].is_hashed or blocks[index].ref_count != 1:
                raise RuntimeError(
                    f"kv_compress: packed block {index} of {request} is shared or "
                    f"in the prefix cache"
                )
    for request, row in rows.items():
        if request not in packed and any(blocks[block].is_null for block in row):
            raise RuntimeError(f"kv_compress: {request} is not packed but holds null blocks")


def check_state(state: PackedState, expected: Sequence[PackedRow]) -> None:
    """Check the worker's view against the scheduler's, after the compressions of a step.

    Raises:
        RuntimeError: slots, F, first blocks or owners differ, or the pages of a packed request
            are not dealt to exactly one (layer, head) each.
    """
    per_block = state.group.pages_per_block
    live = {row.state_slot: row.packed_blocks[0] for row in expected}
    if live != state.slots:
        raise RuntimeError(
            f"kv_compress: the scheduler knows packed slots {live}, the worker {state.slots}"
        )
    owner = state.owner.tolist()
    owners = {block: slot for block, slot in enumerate(owner) if slot != layout.NOT_PACKED}
    if owners != {block: slot for slot, block in live.items()}:
        raise RuntimeError(f"kv_compress: owner table {owners} does not match slots {live}")
    for row in expected:
        pages = state.num_pages[row.state_slot].flatten()
        total = len(row.packed_blocks) * per_block
        if int(pages.min()) < 0 or int(pages.sum()) != total:
            raise RuntimeError(
                f"kv_compress: {printable(row.request_id)} has {int(pages.sum())} packed pages "
                f"in {len(row.packed_blocks)} blocks of {per_block}"
            )
        m = state.group.blocks_per_page
        if row.covered % m or total * m > row.covered * per_block:
            raise RuntimeError(
                f"kv_compress: {printable(row.request_id)} has {total} packed pages of {m} blocks "
                f"each, from {row.covered} blocks of {per_block} pages"
            )
        if state.page_scales is not None:
            scales = state.page_scales[row.state_slot].flatten(0, 1)[pages > 0]
            if not bool(scales.isfinite().all()) or bool((scales[:, 0] < 0).any()):
                raise RuntimeError(
                    f"kv_compress: {printable(row.request_id)} has scales from "
                    f"{float(scales.min())} to {float(scales.max())}"
                )
        of_drafts = state.num_pages[row.state_slot, state.group.target_layers :]
        if not bool((of_drafts == len(row.packed_blocks)).all()):
            raise RuntimeError(
                f"kv_compress: draft layers of {printable(row.request_id)} have "
                f"{of_drafts.tolist()} packed pages in {len(row.packed_blocks)} blocks"
            )
        first = layout.exclusive_cumsum(state.num_pages[row.state_slot])
        if not first.equal(state.first_page[row.state_slot]):
            raise RuntimeError(
                f"kv_compress: pages of {printable(row.request_id)} overlap: counts "
                f"{pages.tolist()}, first pages "
                f"{state.first_page[row.state_slot].flatten().tolist()}"
            )
        if state.echo is not None:
            by_block = state.echo.view(-1, per_block, state.echo.shape[1])
            scores = by_block[torch.tensor(row.packed_blocks, device=by_block.device)]
            if not bool(((scores >= 0) & (scores <= 1 + ROUNDING)).all()):
                raise RuntimeError(
                    f"kv_compress: {printable(row.request_id)} has echo scores from "
                    f"{float(scores.min())} to {float(scores.max())}; they are probabilities"
                )
        if int(state.covered[row.state_slot]) != row.covered:
            raise RuntimeError(
                f"kv_compress: {printable(row.request_id)} covers {row.covered} blocks, the "
                f"worker has {int(state.covered[row.state_slot])}"
            )
