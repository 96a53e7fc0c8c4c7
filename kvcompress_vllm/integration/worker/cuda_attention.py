# SPDX-License-Identifier: Apache-2.0
"""The attention backend on CUDA: our kernel for decode rows, FlashAttention for prefill rows.

vLLM puts decode rows first: those of one new token, and of what is drafted behind it. They may be
packed, and run on ``ops.paged_attention``, whose launch shapes are static and which therefore sits
inside full CUDA graphs. The other rows are prefills. They run on vLLM's FlashAttention over the
layer's own view, except for those that were compressed in the middle of their prompt: these run on
our kernel, too.

Everything a decode graph reads lives in persistent buffers that ``build`` refills.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec

from kvcompress_vllm import ops
from kvcompress_vllm.cache import layout
from kvcompress_vllm.integration.worker.attention import KVCompressBackend, KVCompressImpl
from kvcompress_vllm.integration.worker.metadata import (
    KVCompressMetadata,
    KVCompressMetadataBuilder,
    StepContext,
)


@dataclass
class PrefillRows:
    """A run of rows after the decode rows, all packed or none; tokens counted from its first."""

    packed: bool
    first_token: int
    num_tokens: int
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    state_slot: Tensor
    max_query_len: int
    max_seq_len: int


@dataclass
class KVCompressCudaMetadata(KVCompressMetadata):
    """One step's batch, split into decode rows (the base fields) and prefill rows."""

    num_decode_tokens: int = 0
    decode_query_len: int = 1
    """Tokens of a decode row at most."""
    prefills: list[PrefillRows] = field(default_factory=list)


class KVCompressCudaMetadataBuilder(KVCompressMetadataBuilder):
    """Splits the batch and keeps what graphs read at fixed addresses."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert self.reorder_batch_threshold is not None
        self._decode_query_len = self.reorder_batch_threshold
        scheduler = vllm_config.scheduler_config
        self._state_slot = torch.full(
            (scheduler.max_num_seqs,), layout.NOT_PACKED, dtype=torch.int32, device=device
        )
        # A prompt's last token can come alone, in a step that runs as a full decode graph, and
        # must be observed there too; so the graphs always look here, and mostly find -1.
        self._ring_index = torch.full(
            (scheduler.max_num_batched_tokens,), -1, dtype=torch.int32, device=device
        )
        self._ring_in_use = 0
        self._table: Tensor | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KVCompressCudaMetadata:
        common = common_attn_metadata
        decodes, prefills, decode_tokens, _ = split_decodes_and_prefills(
            common, self._decode_query_len
        )
        block_table = self._decode_table(common.block_table_tensor[:decodes])
        state_slot = self._state_slot[:decodes]
        if self.context is not None and decodes:
            owner = self.context.state.owner
            torch.index_select(owner, 0, block_table[:, 0], out=state_slot)
        return KVCompressCudaMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start=common.query_start_loc[: decodes + 1],
            seq_lens=common.seq_lens[:decodes],
            block_table=block_table,
            slot_mapping=common.slot_mapping,
            state_slot=state_slot,
            ring_index=self._fill_ring_index(common),
            echo=self.echo(common),
            repeated=self.repeated(common),
            num_decode_tokens=decode_tokens,
            decode_query_len=self._decode_query_len,
            prefills=[
                self._prefill_rows(common, begin, end, packed)
                for begin, end, packed in self._runs(common, decodes, decodes + prefills)
            ],
        )

    def _decode_table(self, blocks: Tensor) -> Tensor:
        """Rows of kernel blocks, where graphs read them."""
        if self.kernel_blocks == 1:
            return blocks
        if self._table is None:
            shape = self._state_slot.shape[0], blocks.shape[1] * self.kernel_blocks
            self._table = torch.zeros(shape, dtype=blocks.dtype, device=blocks.device)
        return self.table(blocks, self._table[: blocks.shape[0]])

    def _runs(
        self, common: CommonAttentionMetadata, begin: int, end: int
    ) -> list[tuple[int, int, bool]]:
        """Neighbouring rows of ``[begin, end)`` that are packed alike: (first, end, packed)."""
        packed_rows = self._packed_rows(common)
        if begin == end:
            return []
        runs: list[tuple[int, int, bool]] = []
        for packed, group in groupby(range(begin, end), key=packed_rows.__contains__):
            run = list(group)
            runs.append((run[0], run[-1] + 1, packed))
        return runs

    def _packed_rows(self, common: CommonAttentionMetadata) -> frozenset[int]:
        """Packed rows with several tokens. What a draft model computes comes after the step, whose
        plan is done with by then; its rows are those of the step."""
        context = self.context
        if context is None:
            return frozenset()
        if not self.drafts:
            names = context.packed_prefills
            rows = context.request_rows(common) if names else {}
            context.packed_rows = frozenset(rows[request_id] for request_id in names)
        return context.packed_rows

    def _prefill_rows(
        self, common: CommonAttentionMetadata, begin: int, end: int, packed: bool
    ) -> PrefillRows:
        starts = common.query_start_loc_cpu
        block_table = self.table(common.block_table_tensor[begin:end])
        first, last = int(starts[begin]), int(starts[end])
        if packed:
            assert self.context is not None
            state_slot = self.context.state.state_slots(block_table)
        else:
            state_slot = torch.full_like(common.seq_lens[begin:end], layout.NOT_PACKED)
        return PrefillRows(
            packed,
            first,
            last - first,
            common.query_start_loc[begin : end + 1] - first,
            common.seq_lens[begin:end],
            block_table,
            state_slot,
            common.max_query_len,
            common.max_seq_len,
        )

    def _fill_ring_index(self, common: CommonAttentionMetadata) -> Tensor:
        index = self.ring_index(common)
        if self._ring_in_use:
            self._ring_index[: self._ring_in_use].fill_(-1)
        self._ring_in_use = 0 if index is None else index.shape[0]
        if index is not None:
            self._ring_index[: index.shape[0]].copy_(index, non_blocking=True)
        return self._ring_index[: common.num_actual_tokens]


class KVCompressCudaImpl(KVCompressImpl):
    """One layer's attention on CUDA."""

    def bind(self, context: StepContext, layer_name: str) -> None:
        super().bind(context, layer_name)
        self._ring = context.state.ring[self._layer].flatten(0, 1)  # a draft layer writes nothing
        self._fa_version = fa_utils.get_flash_attn_version(head_size=self.head_size)
        # FlashAttention 2 knows no sinks, 3 and 4 only those in bfloat16.
        if self.sinks is not None and (
            self._fa_version not in (3, 4) or self.sinks.dtype is not torch.bfloat16
        ):
            self._fa_version = None

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: KVCompressMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None or (self._context is None and self.profiling):  # no cache yet
            return output.fill_(0)
        if self._context is None:
            raise RuntimeError(
                "kv_compress: attention runs before the worker has bound its state, on "
                f"{attn_metadata.num_actual_tokens} tokens"
            )
        meta, state = attn_metadata, self._context.state
        assert isinstance(meta, KVCompressCudaMetadata) and meta.ring_index is not None
        query = query.view(-1, self.num_heads, self.head_size)
        out = output.view(-1, self.num_heads, self.head_size)
        if not self.of_draft:
            ops.observe_queries(query, meta.ring_index, self._ring)
        # Never in a captured graph: what is scored runs in none (StepContext.scores_prompts).
        if meta.echo is not None and not self.of_draft:
            self.score(query, meta.echo)
        self.replay(query, meta.repeated)
        if meta.num_decode_tokens:
            ops.paged_attention(
                query[: meta.num_decode_tokens],
                self._context.pages,
                meta.block_table,
                meta.seq_lens,
                meta.state_slot,
                *state.tables,
                meta.query_start,
                self._layer,
                self.scale,
                out[: meta.num_decode_tokens],
                **self.logits,
                decode_query_len=meta.decode_query_len,
            )
        for rows in meta.prefills:
            self._prefill(query, kv_cache, rows, out)
        return output

    def _prefill(self, query: Tensor, kv_cache: Tensor, rows: PrefillRows, out: Tensor) -> None:
        span = slice(rows.first_token, rows.first_token + rows.num_tokens)
        # Where FlashAttention cannot do it, our kernel serves all rows, slower.
        if rows.packed or self._fa_version is None:
            assert self._context is not None
            state = self._context.state
            ops.paged_attention(
                query[span],
                self._context.pages,
                rows.block_table,
                rows.seq_lens,
                rows.state_slot,
                *state.tables,
                rows.query_start,
                self._layer,
                self.scale,
                out[span],
                **self.logits,
            )
            return
        # [N, H, B, 2 * D] -> K and V as [N, B, H, D]
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        fa_utils.flash_attn_varlen_func(  # type: ignore[attr-defined]
            q=query[span],
            k=canonicalize_singleton_dim_strides(keys),
            v=canonicalize_singleton_dim_strides(values),
            out=out[span],
            cu_seqlens_q=rows.query_start,
            max_seqlen_q=rows.max_query_len,
            seqused_k=rows.seq_lens,
            max_seqlen_k=rows.max_seq_len,
            softmax_scale=self.scale,
            softcap=self.soft_cap,
            causal=True,
            block_table=rows.block_table,
            fa_version=self._fa_version,
            s_aux=self.sinks,
        )


class KVCompressCudaBackend(KVCompressBackend):
    """The CUSTOM backend on CUDA."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]

    @staticmethod
    def get_impl_cls() -> type[KVCompressImpl]:
        return KVCompressCudaImpl

    @staticmethod
    def get_builder_cls() -> type[KVCompressMetadataBuilder]:
        return KVCompressCudaMetadataBuilder
