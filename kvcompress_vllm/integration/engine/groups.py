# SPDX-License-Identifier: Apache-2.0
"""Cache groups beside the one that is compressed: layers with a window or chunks (decision 026), or
with a state in the place of keys (decision 033).

They stay vLLM's, with rows and managers of their own, in the same pool. What of a request's blocks
they hold, and will hold, counts wherever blocks are counted; and where its layers with full
attention attend to fewer keys than its hash says, what these compute is wrong for others, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.request import Request

from kvcompress_vllm.integration.engine.kv_cache import (
    PRIVATE,
    KVCompressManager,
    KVCompressSpec,
)
from kvcompress_vllm.integration.sizing import draft_tokens
from kvcompress_vllm.scheduling.local import Local, LocalLayers, State


def compressed_group(specs: Sequence[KVCacheSpec]) -> int:
    """Index of the one of vLLM's cache groups that is compressed.

    Args:
        specs: of all groups, in vLLM's order.

    Raises:
        ValueError: there is none, there are several, or its blocks are of another size than those
            of other groups.
    """
    ours = [index for index, spec in enumerate(specs) if isinstance(spec, KVCompressSpec)]
    if len(ours) != 1:
        raise ValueError(
            f"kv_compress: vLLM puts the layers with full attention into {len(ours)} KV cache "
            f"groups, beside {len(specs) - len(ours)} of other layers; exactly one group can be "
            "compressed"
        )
    # A state takes a block, whatever vLLM says of how many tokens it is.
    sizes = sorted({spec.block_size for spec in specs if not isinstance(spec, MambaSpec)})
    if len(sizes) > 1:
        raise ValueError(
            f"kv_compress: the KV cache groups have blocks of {sizes} tokens; models can be "
            "compressed whose layers all have blocks of one size"
        )
    return ours[0]


def span_of(spec: KVCacheSpec) -> Local | State:
    """What a layer keeps that compression leaves alone.

    Raises:
        ValueError: it is of a kind that cannot stand beside compressed ones.
    """
    if isinstance(spec, MambaSpec):
        if spec.mamba_cache_mode != "none":
            raise ValueError(
                f"kv_compress: states are cached by mamba_cache_mode={spec.mamba_cache_mode!r}, "
                "which is not supported together with --kv-compress; 'none' is, without prefix "
                "caching"
            )
        return State(1 + spec.num_speculative_blocks)
    other: Any = spec
    window = getattr(other, "sliding_window", None)
    if window is not None:
        return Local(window - 1)
    chunk = getattr(other, "attention_chunk_size", None)
    if chunk is None:
        raise ValueError(f"kv_compress: layers of {spec} cannot stand beside compressed ones")
    return Local(chunk, aligned=chunk % spec.block_size == 0)


def _is_real(block: KVCacheBlock) -> bool:
    return not block.is_null


class OtherGroups:
    """vLLM's managers of the groups that are not compressed; none in most models.

    Args:
        coordinator: of the engine; its ``cache_blocks`` is replaced.
        config: says how many tokens steps may compute at once.

    Attributes:
        manager: of the group that is compressed.
        index: which of vLLM's groups that is.
        on_packed: called with a request that is packed, and its computed tokens, in place of vLLM's
            caching of them; None: nobody wants to know.
    """

    def __init__(self, coordinator: KVCacheCoordinator, config: VllmConfig) -> None:
        managers = coordinator.single_type_managers
        self.index = compressed_group([manager.kv_cache_spec for manager in managers])
        found = managers[self.index]
        if not isinstance(found, KVCompressManager):
            raise RuntimeError(f"kv_compress: the block manager is {type(found).__name__}")
        self.manager = found
        self.on_packed: Callable[[Request, int], None] | None = None
        self._coordinator = coordinator
        self._others = [manager for manager in managers if manager is not found]
        self._layers = LocalLayers(
            [span_of(manager.kv_cache_spec) for manager in self._others],
            found.block_size,
            config.max_in_flight_tokens,
            draft_tokens(config),
        )
        stock = coordinator.cache_blocks

        def cache_blocks(
            request: Request, num_computed_tokens: int, *args: Any, **kwargs: Any
        ) -> None:
            # Behind a compression every layer computes from fewer keys than the hash says, also
            # one whose own are all there. A hit takes blocks of all groups, so none may have any.
            if request.request_id in found.packed:
                if self.on_packed is not None:
                    self.on_packed(request, num_computed_tokens)
            elif not hasattr(request, PRIVATE):
                stock(request, num_computed_tokens, *args, **kwargs)

        coordinator.cache_blocks = cache_blocks  # type: ignore[method-assign]

    def __bool__(self) -> bool:
        return bool(self._others)

    def most(self, num_tokens: int) -> int:
        """The most blocks that they hold of a request that is to have ``num_tokens`` tokens."""
        return self._layers.most(num_tokens)

    def decoding(self, num_tokens: int) -> int:
        """The same once its prompt is computed."""
        return self._layers.decoding(num_tokens)

    def held(self, request_id: str) -> int:
        """Blocks that they hold of a request now."""
        rows = [manager.req_to_blocks.get(request_id, ()) for manager in self._others]
        # What a window has passed is the front of a row.
        return sum(len(row) - bisect_left(row, 1, key=_is_real) for row in rows)

    def growth(self, computed: Mapping[str, int], window: int) -> int:
        """Blocks that they will take while each running request decodes ``window`` more tokens."""
        if not self._others:
            return 0
        return sum(self._layers.growth(n, window) for n in computed.values() if n)

    def blocks(self) -> Iterator[KVCacheBlock]:
        """Every block in a row of theirs, once for each row."""
        for manager in self._others:
            for row in manager.req_to_blocks.values():
                yield from (block for block in row if not block.is_null)

    def hit(self, request: Request, num_tokens: int) -> tuple[tuple[Any, ...], int]:
        """The longest hit of at most ``num_tokens`` tokens, blocks by group. A window lies at the
        end of a hit, so a shorter one has other blocks, and a longer one cannot be cut."""
        spec = self.manager.kv_cache_spec
        assert isinstance(spec, KVCompressSpec)
        # Of what it is given, our group leaves the observed tokens to compute; these are beyond.
        longest = min(num_tokens + spec.window, request.num_tokens) - 1
        blocks, length, *_ = self._coordinator.find_longest_cache_hit(request.block_hashes, longest)
        return tuple(blocks), length
