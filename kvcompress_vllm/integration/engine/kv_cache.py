# SPDX-License-Identifier: Apache-2.0
"""Our KV cache spec and its block manager: packed blocks + null blocks + tail in vLLM's own pool.

vLLM allocates, counts, shares and frees every block with its stock code; this only replaces the
front of a request's row when it is compressed. Importing this module registers the pair with
vLLM's public registry, which is also what unpickling a spec in the engine core does first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kvcompress_vllm.cache.integrity import Block, check_pool
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.sizing import draft_tokens
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.records.budget import RequestBudget
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.packing import Packing
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.need import blocks_needed
from kvcompress_vllm.scheduling.sizes import NOTHING, Sizes

PRIVATE = "kv_compress_private"
"""Attribute of requests whose blocks are not for the prefix cache."""


@dataclass(frozen=True, kw_only=True)
class KVCompressSpec(FullAttentionSpec):
    """Full attention whose requests may be packed.

    Attributes:
        window: last prompt queries that must be computed, not taken from the prefix cache.
        queries_per_head: query heads per KV head.
        scale: factor on the attention logits.
        soft_cap: of the attention logits; 0: none.
        page_format: how packed pages hold keys.
        draft_layers: of these layers, those of a draft model. Not compared: all go into one group.
        kernel_block_size: tokens of a page, where a block has more; None: as many.
    """

    window: int = 1
    queries_per_head: int = 1
    scale: float = 1.0
    soft_cap: float = 0.0
    page_format: PageFormat = PageFormat.AUTO
    draft_layers: int = field(default=0, compare=False)
    kernel_block_size: int | None = None

    @property
    def kernel_blocks(self) -> int:
        """Kernel blocks of a block."""
        return self.block_size // (self.kernel_block_size or self.block_size)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        # What vLLM demands of the pool, so that the longest request fits alone.
        config, longest = resolved_config(vllm_config), vllm_config.model_config.max_model_len
        if config is None:
            stock: int = super().max_memory_usage_bytes(vllm_config)
            return stock
        # The null block is in the pool, too, and no request can have it.
        drafts = draft_tokens(vllm_config)
        needed = most_needed(config, self.block_size, longest, drafts, self.kernel_blocks)
        return (needed + 1) * self.page_size_bytes

    @classmethod
    def of(
        cls,
        spec: FullAttentionSpec,
        window: int,
        queries_per_head: int,
        scale: float,
        page_format: PageFormat = PageFormat.AUTO,
        soft_cap: float = 0.0,
        draft_layers: int = 0,
        kernel_block_size: int | None = None,
    ) -> KVCompressSpec:
        """The spec of a layer that vLLM describes as plain full attention."""
        values = {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}
        return cls(
            **values,
            window=window,
            queries_per_head=queries_per_head,
            scale=scale,
            soft_cap=soft_cap,
            page_format=page_format,
            draft_layers=draft_layers,
            kernel_block_size=kernel_block_size,
        )

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        # How vLLM asks whether all layers are alike.
        assert all(isinstance(spec, cls) for spec in specs), "not all layers have full attention"
        # Nobody observes the queries of draft layers.
        targets = [spec for spec in specs if not spec.draft_layers] or specs
        alike = {(spec.queries_per_head, spec.scale, spec.soft_cap) for spec in targets}
        if len(alike) != 1:
            found = ", ".join(
                f"{scale:g} and {count} per KV head" + (f", capped at {cap:g}" if cap else "")
                for count, scale, cap in alike
            )
            raise ValueError(
                "kv_compress: all layers must share the attention scale, the soft cap and the head "
                f"count; they have {found}"
            )
        ((queries_per_head, scale, soft_cap),) = alike
        window = max(spec.window for spec in specs)
        merged = super().merge(specs)
        return replace(
            merged,
            window=window,
            queries_per_head=queries_per_head,
            scale=scale,
            soft_cap=soft_cap,
            page_format=specs[0].page_format,
            draft_layers=sum(spec.draft_layers for spec in specs),
            kernel_block_size=specs[0].kernel_block_size,
        )


def cache_group(spec: KVCacheSpec, layers: int) -> CacheGroup:
    """A group of layers as vLLM tells scheduler and workers of it.

    Args:
        spec: of each of its layers.
        layers: how many there are on a rank.

    Raises:
        ValueError: they cannot be compressed.
    """
    if not isinstance(spec, KVCompressSpec):
        raise ValueError(f"kv_compress: cannot compress {spec}")
    if spec.page_size_padded is not None:
        raise ValueError(
            f"kv_compress: vLLM pads the pages of layers with full attention to "
            f"{spec.page_size_padded} bytes, as large as those of other layers; such models cannot "
            "be compressed"
        )
    return CacheGroup(
        layers=layers,
        heads=spec.num_kv_heads,
        queries_per_head=spec.queries_per_head,
        head_size=spec.head_size,
        block_size=spec.kernel_block_size or spec.block_size,
        itemsize=spec.dtype.itemsize,
        scale=spec.scale,
        soft_cap=spec.soft_cap,
        page_format=spec.page_format,
        draft_layers=spec.draft_layers,
        kernel_blocks=spec.kernel_blocks,
    )


def most_needed(
    config: KVCompressConfig, block_size: int, longest: int, drafts: int, kernel_blocks: int = 1
) -> int:
    """Blocks that a request of ``longest`` tokens needs that asks for nothing of its own."""
    sizes = Sizes(resolve(config), Limits.of(config, block_size, longest, kernel_blocks))
    return blocks_needed(sizes, config.window, longest, drafts)


def budget_of(request: Request) -> RequestBudget | None:
    """The budget of a request; None: the configured one."""
    budget: RequestBudget | None = getattr(request, "kv_compress_budget", None)
    return budget


class KVCompressManager(FullAttentionManager):
    """Blocks of every request; knows which rows are packed.

    Attributes:
        packed: every packed request.
        on_release: called with the request id when its blocks are given up, packed or not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM asks for exactly its own specs. What states leave in a block may be no numbers at
        # all, and a kernel may multiply what it masks by 0.
        self._record_new_block_ids = bool(kwargs.get("needs_kv_cache_zeroing"))
        self.packed: dict[str, Packing] = {}
        self.on_release: Callable[[str], None] = lambda request_id: None

    def row(self, request_id: str, length: int) -> list[int]:
        """The first ``length`` block ids of a request."""
        return [block.block_id for block in self.req_to_blocks[request_id][:length]]

    def held_by_packed(self) -> int:
        """Blocks that packed requests hold, tails included."""
        rows = self.req_to_blocks  # not `held` of each: asked on every step
        return sum([len(rows[name]) - f + c for name, (f, c) in self.packed.items()])

    def held(self, request_id: str) -> int:
        """Blocks that a request holds, packed or not."""
        row = len(self.req_to_blocks[request_id])
        return self.packed.get(request_id, NOTHING).held(row)

    def pack(self, request_id: str, packing: Packing) -> tuple[list[int], list[KVCacheBlock]]:
        """Replace the first F blocks of a row by C new ones and null blocks.

        Args:
            request_id: a running request whose first F blocks are full.
            packing: (F, C); C is at most the free blocks of the pool.

        Returns:
            The ids of the packed blocks, and the old blocks. The caller frees these once every
            request of the step has its new blocks, so that no copy of the step writes into a block
            that another still reads.
        """
        blocks, (covered, kept) = self.req_to_blocks[request_id], packing
        new = self.block_pool.get_new_blocks(kept)
        old = [block for block in blocks[:covered] if not block.is_null]
        blocks[:covered] = new + [self._null_block] * (covered - kept)
        self.packed[request_id] = packing
        return [block.block_id for block in new], old

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.packed.pop(request_id, None)
        self.on_release(request_id)
        return [b for b in super().pop_blocks_for_free(request_id) if not b.is_null]

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        return 0  # cascade attention would read packed rows as shared prefixes

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        # vLLM leaves one token to compute; the observed queries must be computed as well, so that
        # a prefix cache hit keeps the same keys as a miss.
        assert isinstance(kv_cache_spec, KVCompressSpec)
        max_length = max(0, max_length + 1 - kv_cache_spec.window)
        return super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            *args,
            **kwargs,
        )

    def check_integrity(
        self, held: Sequence[KVCacheBlock] = (), shared: Collection[int] = ()
    ) -> None:
        """Check the whole pool (see :func:`kvcompress_vllm.cache.integrity.check_pool`).

        Args:
            held: blocks that are referenced although they are in no row of this group: in one of
                another, or their request let go of them.
            shared: packed blocks of contexts, which several requests may hold.
        """
        pool = self.block_pool
        references: dict[int, int] = {}
        for block in held:
            references[block.block_id] = references.get(block.block_id, 0) + 1
        check_pool(
            [Block(b.ref_cnt, b.is_null, b.block_hash is not None) for b in pool.blocks],
            [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
            {rid: [b.block_id for b in blocks] for rid, blocks in self.req_to_blocks.items()},
            self.packed,
            references,
            shared,
        )


KVCacheSpecRegistry.register(
    KVCompressSpec, KVCompressManager, uniform_type_base_spec=FullAttentionSpec
)
