# SPDX-License-Identifier: Apache-2.0
"""Attention backend over pages: packed and unpacked requests alike. Letters as in ``layout.py``.

Registered as vLLM's CUSTOM backend when compression is on, and used by the CPU platform in any
case; unbound (compression off) it is ordinary paged attention over vLLM's own layout.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionType,
    MultipleOf,
)

from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import Logits, Tables
from kvcompress_vllm.compression import replay
from kvcompress_vllm.compression.echo import Rotation
from kvcompress_vllm.integration.compat.releases import kv_cache_layouts
from kvcompress_vllm.integration.worker.metadata import (
    Echo,
    KVCompressMetadata,
    KVCompressMetadataBuilder,
    Repeated,
    StepContext,
)
from kvcompress_vllm.scheduling.segments import SEGMENT


class KVCompressImpl(AttentionImpl[KVCompressMetadata]):
    """Writes K/V, observes queries and attends, for one layer."""

    profiling: ClassVar[bool] = False
    """Whether vLLM measures memory: it then runs batches of nothing before there is a cache."""
    windows: ClassVar[bool] = False
    """Whether layers may see a window only; those are never compressed."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "sliding window attention": sliding_window is not None and not self.windows,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
        }
        for feature, wanted in unsupported.items():
            if wanted:
                raise ValueError(
                    f"kv_compress: {feature} is not supported by this attention backend"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.sinks = sinks
        """``[H * G]``, a parameter of the model: its weights come later."""
        if sinks is not None and sinks.shape != (num_heads,):
            raise ValueError(
                f"kv_compress: attention sinks of shape {list(sinks.shape)} for {num_heads} heads"
            )
        self.num_kv_heads = num_kv_heads or num_heads
        self.window = sliding_window
        self._context: StepContext | None = None
        self._layer = 0
        self.of_draft = False
        """Whether it is a layer of a draft model: nothing of it is observed or scored."""
        self._rotation: Rotation | None = None
        self._unpacked: tuple[Tensor, Tensor] | None = None
        self._logits: Logits | None = None

    @property
    def logits(self) -> Logits:
        """How its logits are changed before the softmax; sinks in fp32, as ops take them."""
        if self._logits is None:
            sinks = None if self.sinks is None else self.sinks.detach().float().contiguous()
            self._logits = {"soft_cap": self.soft_cap, "sink_logits": sinks}
        return self._logits

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Weights that are loaded once more bring other sinks; graphs read where they were."""
        copy = None if self._logits is None else self._logits["sink_logits"]
        if copy is not None and self.sinks is not None:
            copy.copy_(self.sinks.detach())

    def bind(self, context: StepContext, layer_name: str) -> None:
        """Attach the rank's state."""
        self._context = context
        self._layer = context.layer_index[layer_name]
        self.of_draft = self._layer >= context.state.group.target_layers
        if self.of_draft:
            return  # its scale, soft cap and sinks are its own
        self._logits = context.state.logits(self._layer)
        if context.rotations:
            self._rotation = context.rotations[self._layer]

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        ops.write_kv(key, value, kv_cache, slot_mapping)

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
        if attn_metadata is None:  # profiling run, no cache yet
            return output.fill_(0)
        meta, context = attn_metadata, self._context
        query = query.view(-1, self.num_heads, self.head_size)
        if context is None:
            pages, tables = self._standard(kv_cache)
        else:
            state, pages = context.state, context.pages
            tables = state.tables
            if meta.ring_index is not None and not self.of_draft:
                ring = state.ring[self._layer].flatten(0, 1)
                ops.observe_queries(query, meta.ring_index, ring)
            if meta.echo is not None and not self.of_draft:
                self.score(query, meta.echo)
            self.replay(query, meta.repeated)
        ops.paged_attention(
            query,
            pages,
            meta.block_table,
            meta.seq_lens,
            meta.state_slot,
            *tables,
            meta.query_start,
            self._layer,
            self.scale,
            output.view(-1, self.num_heads, self.head_size),
            **self.logits,
        )
        return output

    def score(self, query: Tensor, echo: Echo) -> None:
        """Store the echo scores of this step's keys, which are in the cache already."""
        context, rotation = self._context, self._rotation
        assert context is not None and context.state.echo is not None and rotation is not None
        ops.echo_scores(
            query,
            context.pages,
            *echo.rows,
            *context.state.tables,
            echo.segments,
            rotation.angles,
            self._layer,
            SEGMENT,
            context.num_sinks,
            rotation.interleaved,
            self.scale,
            context.state.echo,
            **self.logits,
        )

    def replay(self, query: Tensor, repeated: list[Repeated]) -> None:
        """Score keys of contexts by what this step's repetition of them pays."""
        context = self._context
        assert context is not None
        for item in () if self.of_draft else repeated:
            replay.score(
                context.state,
                context.pages,
                self._layer,
                query[item.tokens],
                item.row,
                item.num_context,
                item.first,
            )

    def _standard(self, kv_cache: Tensor) -> tuple[Tensor, Tables]:
        """vLLM's own per-layer cache as pages of one layer, with empty state tables."""
        if self._unpacked is None:
            table = torch.empty(0, 1, self.num_kv_heads, dtype=torch.int32, device=kv_cache.device)
            self._unpacked = table, table.new_empty(0)
        heads, covered = self._unpacked
        return kv_cache.flatten(0, 1), (heads, heads, covered, None, PageFormat.AUTO)


class KVCompressBackend(AttentionBackend):
    """``[N, H, B, 2 * D]`` per layer, K then V, which the packed layout strides over all layers."""

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVCompressImpl]:
        return KVCompressImpl

    @staticmethod
    def get_builder_cls() -> type[KVCompressMetadataBuilder]:
        return KVCompressMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_supported_kernel_block_sizes(*args: Any, **kwargs: Any) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        # Layers inside a block; vLLM 0.29 and later ask this instead of the two methods below.
        return kv_cache_layouts("BLHNC")

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return num_blocks, num_kv_heads, block_size, 2 * head_size

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        # [N, L, H, B, 2 * D]: layers inside a block.
        return (1, 0, 2, 3, 4) if include_num_layers_dimension else (0, 1, 2, 3)
