# SPDX-License-Identifier: Apache-2.0
"""What the attention layers are told of a step's batch: rows, what is observed and what is scored.

Letters as in ``layout.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from kvcompress_vllm.cache import layout
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.compression.echo import Rotation
from kvcompress_vllm.records.plan import Observation, Replay, Span
from kvcompress_vllm.scheduling.segments import segments


@dataclass
class StepContext:
    """What the worker tells the attention layers of its rank; one per worker."""

    state: PackedState
    pages: Tensor
    """``[P, B, 2 * D]`` of all layers."""
    layer_index: dict[str, int]
    """l of every attention layer, by vLLM's layer name."""
    request_rows: Callable[[CommonAttentionMetadata], dict[str, int]]
    """Row of every request in the batch whose metadata is being built."""
    rotations: list[Rotation] = field(default_factory=list)
    """By layer, where keys get echo scores."""
    num_sinks: int = 0
    """First keys that echo scores count with every segment."""
    observations: list[Observation] = field(default_factory=list)
    """Of the step that is about to run."""
    packed_prefills: list[str] = field(default_factory=list)
    """Packed requests that compute several tokens in the step that is about to run."""
    packed_rows: frozenset[int] = frozenset()
    """Their rows in the batch whose metadata was built last; the draft model's steps that follow
    are of the same rows."""
    echoes: list[Span] = field(default_factory=list)
    """Tokens whose keys get echo scores in the step that is about to run."""
    replays: list[Replay] = field(default_factory=list)
    """Tokens that repeat a context in the step that is about to run."""

    @property
    def scores_prompts(self) -> bool:
        """Whether the step that is about to run scores keys outside of what a graph would do: a
        chunk of a prompt may be as long as a step of speculation, and then looks like one."""
        return bool(self.echoes or self.replays)


@dataclass
class Echo:
    """Whose keys get echo scores in a step: arguments of ``ops.echo_scores``."""

    rows: tuple[Tensor, Tensor, Tensor]
    """``block_table``, ``seq_lens`` and ``state_slot`` of the whole batch."""
    segments: Tensor


@dataclass
class Repeated:
    """Tokens that repeat a context in a step: arguments of :func:`replay.score`."""

    tokens: slice
    """Of the batch."""
    row: Tensor
    num_context: int
    first: int


@dataclass
class KVCompressMetadata(AttentionMetadata):
    """One step's batch, shared by all layers."""

    num_actual_tokens: int
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    state_slot: Tensor
    ring_index: Tensor | None
    echo: Echo | None = field(default=None, kw_only=True)
    repeated: list[Repeated] = field(default_factory=list, kw_only=True)


class KVCompressMetadataBuilder(AttentionMetadataBuilder[KVCompressMetadata]):
    """Finds the packed rows of a batch and the queries to observe."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.context: StepContext | None = None
        self.drafts = False
        self.kernel_blocks: int = getattr(kv_cache_spec, "kernel_blocks", 1)
        self._parts = torch.arange(self.kernel_blocks, dtype=torch.int32, device=device)

    def bind(self, context: StepContext, drafts: bool = False) -> None:
        """Attach the rank's state; without it no row is packed.

        Args:
            drafts: it builds for a draft model's steps, of which nothing is observed or scored.
        """
        self.context, self.drafts = context, drafts

    def table(self, blocks: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of kernel blocks, ``[R, M * k]`` int32, of rows of vLLM's blocks ``[R, M]``.

        Args:
            out: where to write them; None: ``blocks`` itself where k is 1, else a new tensor.
        """
        k = self.kernel_blocks
        if k == 1 and out is None:
            return blocks
        if out is None:
            out = blocks.new_empty(blocks.shape[0], blocks.shape[1] * k)
        torch.add(blocks[..., None] * k, self._parts, out=out.unflatten(1, (-1, k)))
        return out

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KVCompressMetadata:
        common = common_attn_metadata
        block_table = self.table(common.block_table_tensor)
        if self.context is None:
            state_slot = torch.full_like(common.seq_lens, layout.NOT_PACKED)
        else:
            state_slot = self.context.state.state_slots(block_table)
        return KVCompressMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=block_table,
            slot_mapping=common.slot_mapping,
            state_slot=state_slot,
            ring_index=self.ring_index(common),
            echo=self.echo(common),
            repeated=self.repeated(common),
        )

    def ring_index(self, common: CommonAttentionMetadata) -> Tensor | None:
        """``[T]`` int32 place of every token's query in the ring, -1 for none; None: no query."""
        if self.context is None or self.drafts or not self.context.observations:
            return None
        window = self.context.state.window
        rows = self.context.request_rows(common)
        starts = common.query_start_loc_cpu.tolist()
        index = [-1] * common.num_actual_tokens
        unverified: list[tuple[Observation, int, int, int]] = []
        for item in self.context.observations:
            if item.request_id not in rows:
                raise RuntimeError(
                    f"kv_compress: observed request {item.request_id} is not in the batch"
                )
            row = rows[item.request_id]
            begin, end = starts[row], starts[row + 1]
            if item.unverified:
                unverified.append((item, row, begin, end))
                continue
            positions = item.positions(end - begin, window)[::-1]
            if positions:
                token = begin - item.first_token
                observed = slice(token + positions[0], token + positions[-1] + 1, item.stride)
                index[observed] = item.places(positions, window)
        found = to_device(index, torch.int32, self.device)
        if unverified:
            observe_unverified(found, unverified, common.seq_lens, window)
        return found

    def echo(self, common: CommonAttentionMetadata) -> Echo | None:
        """What gets echo scores in this step; None: nothing."""
        context = self.context
        if context is None or self.drafts or not context.echoes:
            return None
        rows, starts = context.request_rows(common), common.query_start_loc_cpu.tolist()
        found = []
        for item in context.echoes:
            if item.request_id not in rows:
                raise RuntimeError(
                    f"kv_compress: scored request {item.request_id} is not in the batch"
                )
            row = rows[item.request_id]
            for begin, end in segments(item.first, item.end):
                query = starts[row + 1] - item.behind - (item.end - begin)
                found.append([row, begin, end, query])
        if not found:
            return None
        table = self.table(common.block_table_tensor)
        return Echo(
            (table, common.seq_lens, context.state.state_slots(table)),
            to_device(found, torch.int32, self.device),
        )

    def repeated(self, common: CommonAttentionMetadata) -> list[Repeated]:
        """What repeats a context in this step."""
        context = self.context
        if context is None or self.drafts or not context.replays:
            return []
        rows, starts = context.request_rows(common), common.query_start_loc_cpu.tolist()
        found = []
        for item in context.replays:
            if item.request_id not in rows:
                raise RuntimeError(
                    f"kv_compress: repeating request {item.request_id} is not in the batch"
                )
            begin = starts[rows[item.request_id]]
            blocks = to_device(item.blocks, torch.int64, self.device)
            tokens = slice(begin, begin + item.end - item.first)
            found.append(Repeated(tokens, blocks, item.num_context, item.first))
        return found


def observe_unverified(
    ring_index: Tensor,
    observed: Sequence[tuple[Observation, int, int, int]],
    seq_lens: Tensor,
    window: int,
) -> None:
    """Fill in places of queries whose positions only the device knows. Waits for nothing.

    Args:
        ring_index: ``[T]`` int32, changed.
        observed: each with its row, and its tokens ``[begin, end)`` of the batch; one query after
            the other is observed.
        seq_lens: ``[R]`` int32, tokens of each row with those of the step.
        window: W.
    """
    tokens = [
        [token, row, end - token, item.observe_slot * window, item.observe_from, item.observe_until]
        for item, row, begin, end in observed
        for token in range(begin, end)
    ]
    token, row, behind, slot, first, until = to_device(tokens, torch.int64, seq_lens.device).unbind(
        -1
    )
    length = seq_lens[row].long()
    position = length - behind
    # Of a step that is longer than the window only its last queries have room.
    first = torch.maximum(first, torch.minimum(length, until) - window)
    place = slot + position % window
    place = torch.where((position >= first) & (position < until), place, -1)
    ring_index[token] = place.to(ring_index.dtype)
