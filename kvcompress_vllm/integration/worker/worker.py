# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with compression: the packed layout, the rank's state, and each step's plan."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.worker.gpu_worker import Worker

from kvcompress_vllm import ops
from kvcompress_vllm.cache.state import PackedState, stacked_sinks
from kvcompress_vllm.compression import replay
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.compression.echo import score_heard
from kvcompress_vllm.compression.pending import PendingReports
from kvcompress_vllm.compression.scratch import scratch_bytes, usable_policies
from kvcompress_vllm.compression.step import start_step
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.engine.groups import compressed_group
from kvcompress_vllm.integration.engine.kv_cache import KVCompressSpec, cache_group
from kvcompress_vllm.integration.sizing import draft_tokens, observe_slots, state_slots
from kvcompress_vllm.integration.start.beside import KERNEL_BLOCK_SIZE
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.integration.worker import backend, states
from kvcompress_vllm.integration.worker.attention import KVCompressImpl
from kvcompress_vllm.integration.worker.longest_request import LongestRequestMixin
from kvcompress_vllm.integration.worker.metadata import StepContext
from kvcompress_vllm.integration.worker.model_runner import RunnerAdapter, adapt, draft_layers
from kvcompress_vllm.integration.worker.placement import all_pages, packed_config
from kvcompress_vllm.integration.worker.rotary import rotations
from kvcompress_vllm.integration.worker.steps import Steps
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.kernel_blocks import in_kernel_blocks
from kvcompress_vllm.records.plan import StepPlan

logger = init_logger("vllm.kv_compress")
backend.register()  # this module is imported by workers, and only where compression is on
backend.tell_chunks_from_full_attention()


class KVCompressWorkerMixin(Worker):
    """Compresses its layers and heads, at the start of the runner's steps."""

    kv_compress_context: StepContext | None = None
    kv_compressor: Compressor | None = None
    kv_compress_runner: RunnerAdapter | None = None

    @property
    def kv_compress_config(self) -> KVCompressConfig:
        config = resolved_config(self.vllm_config)
        if config is None:
            raise RuntimeError("kv_compress: the worker was built without a configuration")
        return config

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        window = self.kv_compress_config.window
        page_format = self.kv_compress_config.page_format
        layers: Any = self.vllm_config.compilation_config.static_forward_context
        specs: dict[str, KVCacheSpec] = {}
        drafts = draft_layers(self.model_runner)
        stock = super().get_kv_cache_spec()
        has_states = any(isinstance(spec, MambaSpec) for spec in stock.values())
        kernel_block_size = KERNEL_BLOCK_SIZE if has_states else None
        for name in sorted(stock, key=drafts.__contains__):  # a draft model's come last
            spec = stock[name]
            if _is_local(spec) or isinstance(spec, MambaSpec):
                specs[name] = spec  # stays vLLM's
                continue
            if not _is_plain(spec):
                raise ValueError(
                    f"kv_compress: layer {name} needs {spec}; only plain causal full attention "
                    "with keys as long as values and an unquantised KV cache can be compressed, "
                    "beside layers with a window, chunks, or a state in the place of keys"
                )
            impl = layers[name].impl
            specs[name] = KVCompressSpec.of(
                spec,
                window,
                impl.num_heads // impl.num_kv_heads,
                impl.scale,
                page_format,
                getattr(impl, "soft_cap", 0.0),
                draft_layers=int(name in drafts),
                kernel_block_size=kernel_block_size,
            )
        if specs and not any(isinstance(spec, KVCompressSpec) for spec in specs.values()):
            raise ValueError(
                "kv_compress: no layer has full attention"
                + (
                    ""
                    if self.parallel_config.pipeline_parallel_size == 1
                    else " in this stage of the pipeline; use fewer stages"
                )
            )
        return specs

    def determine_available_memory(self) -> int:
        KVCompressImpl.profiling = True
        try:
            available = super().determine_available_memory()
        finally:
            KVCompressImpl.profiling = False
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available  # the user sized the cache itself
        if available <= 0:
            return available  # vLLM says what to do about it
        return available - self._extra_bytes(available)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        kv_cache_config = packed_config(kv_cache_config)
        super().initialize_from_config(kv_cache_config)
        self._bind(kv_cache_config)

    def kv_compress_record(self, on: bool = True) -> dict[str, list[list[int]]]:
        """Record which keys compressions keep, for tests; returns and clears the record.

        Returns:
            By request id: kept key indices of every (layer, head) in order.
        """
        assert self.kv_compressor is not None
        record = self.kv_compressor.record or {}
        self.kv_compressor.record = {} if on else None
        return {
            request_id: [keys.tolist() for keys in heads] for request_id, heads in record.items()
        }

    def _start_step(self, plan: StepPlan) -> list[PendingReports]:
        """Before the forward: release, compress, observe."""
        assert self.kv_compress_context is not None and self.kv_compressor is not None
        assert self.kv_compress_runner is not None
        context = self.kv_compress_context
        prefixes = {item.request_id: item.row_prefix for item in plan.compressions}
        plan = in_kernel_blocks(plan, self.kv_compressor.rank.group.kernel_blocks)
        score_heard(
            self.kv_compressor.rank, context.rotations, context.num_sinks, plan.heard
        )  # while rows are what they were
        pending = start_step(plan, [self.kv_compressor])
        self.kv_compress_runner.write_row_prefixes(prefixes)
        context.observations = plan.observations
        context.packed_prefills = plan.packed_prefills
        context.echoes = plan.echoes
        context.replays = plan.replays
        return pending

    def _end_step(self) -> None:
        assert self.kv_compress_context is not None
        self.kv_compress_context.observations = []
        self.kv_compress_context.packed_prefills = []
        self.kv_compress_context.echoes = []
        self.kv_compress_context.replays = []

    def _bind(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the state and attach it to every attention layer and metadata builder."""
        assert self.device is not None
        specs = [each.kv_cache_spec for each in kv_cache_config.kv_cache_groups]
        runner = adapt(self.model_runner, compressed_group(specs))
        layers = self.vllm_config.compilation_config.static_forward_context
        found = kv_cache_config.kv_cache_groups[runner.group]
        names = found.layer_names
        group = cache_group(found.kv_cache_spec, len(names))
        impls = {name: layers[name].impl for name in names}
        targets = names[: group.target_layers]
        if set(targets) & set(draft_layers(self.model_runner)):
            raise RuntimeError(f"kv_compress: of {names} the last {group.draft_layers} draft")
        for impl in impls.values():
            if not isinstance(impl, KVCompressImpl):
                raise RuntimeError(f"kv_compress: attention runs on {type(impl).__name__}")
        if kv_cache_config.has_mamba_layers:
            states.lay_out(layers, kv_cache_config)
        state = self._state(group, kv_cache_config.num_blocks, self.device)
        state.sink_logits = stacked_sinks(
            [impl.sinks if name in targets else None for name, impl in impls.items()]
        )
        pages = all_pages(layers[names[0]].kv_cache, group)
        if kv_cache_config.needs_kv_cache_zeroing:
            states.zero_blocks_of(self.model_runner, pages, group)
        context = StepContext(
            state, pages, {name: i for i, name in enumerate(names)}, runner.request_rows
        )
        config = self.kv_compress_config
        if config.stores_echo:
            context.num_sinks = config.sinks
            context.rotations = rotations(
                self.model_runner.get_model(),
                {name: layers[name] for name in targets},
                config.echo_distance,
                self.device,
            )
        for name, layer_impl in impls.items():
            layer_impl.bind(context, name)
        for builder in runner.metadata_builders():
            builder.bind(context)
        for builder in runner.draft_builders():
            builder.bind(context, drafts=True)
        if self.vllm_config.num_speculative_tokens:
            runner.keep_out_of_full_graphs(lambda: context.scores_prompts)
        self.kv_compress_context = context
        self.kv_compress_runner = runner
        agree = _agree if self.parallel_config.tensor_parallel_size > 1 else None
        longest = self._longest(state, kv_cache_config.num_blocks)
        self.kv_compressor = Compressor(self.kv_compress_config, state, pages, agree, longest)
        Steps(self.model_runner, self._start_step, self._end_step)
        message = ops.missing_kernels(self.device.type)
        if message:
            logger.warning("kv_compress: %s", message)
        cache_bytes = pages.numel() * pages.element_size()
        held, scratch = state.num_bytes(), self._scratch_bytes(state, kv_cache_config.num_blocks)
        scales = 0 if state.page_scales is None else state.page_scales.nbytes
        logger.info(
            "kv_compress: %.1f MiB beside the KV cache of %.1f MiB%s, and up to %.1f MiB while the "
            "longest prompt is compressed (%.2f%%)",
            held / 2**20,
            cache_bytes / 2**20,
            f", {scales / 2**20:.1f} of them scales of packed pages" if scales else "",
            scratch / 2**20,
            100 * (held + scratch) / cache_bytes,
        )

    def _state(self, group: CacheGroup, num_blocks: int, device: torch.device) -> PackedState:
        dtype: Any = self.model_config.dtype
        return PackedState(
            group,
            num_blocks=num_blocks * group.kernel_blocks,
            state_slots=state_slots(self.vllm_config, num_blocks),
            observe_slots=observe_slots(self.vllm_config, group, num_blocks),
            window=self.kv_compress_config.ring(draft_tokens(self.vllm_config)),
            dtype=dtype,
            device=device,
            accumulated=self.kv_compress_config.query_stride > 0,
            echo=self.kv_compress_config.stores_echo,
        )

    def _extra_bytes(self, available: int) -> int:
        """What we allocate beside a KV cache of up to ``available`` bytes."""
        found = self.get_kv_cache_spec().values()
        specs = [spec for spec in found if isinstance(spec, KVCompressSpec)]
        group = cache_group(specs[0].merge(specs), len(specs))
        num_blocks = available // group.block_bytes  # or fewer, where another group has more layers
        state = self._state(group, num_blocks, torch.device("meta"))
        return state.num_bytes() + self._scratch_bytes(state, num_blocks)

    def _longest(self, state: PackedState, num_blocks: int) -> int:
        """Tokens of the longest request that there is room for."""
        tokens = num_blocks * state.group.kernel_blocks * state.group.block_size
        return min(self.model_config.max_model_len, tokens)

    def _scratch_bytes(self, state: PackedState, num_blocks: int) -> int:
        """What the largest possible compression takes while it runs, or a repetition."""
        most = self._longest(state, num_blocks)
        repeats = self.kv_compress_config.exact != "off"
        return max(
            replay.scratch_bytes(most, state.group) if repeats else 0,
            *(
                scratch_bytes(policy, most, state.group, state.accumulated is not None)
                for policy in usable_policies(self.kv_compress_config)
            ),
        )


class KVCompressWorker(LongestRequestMixin, KVCompressWorkerMixin, Worker):
    """The GPU worker."""


def _is_local(spec: KVCacheSpec) -> bool:
    """Whether a layer sees the latest tokens only, in a cache that nothing is done to."""
    return (
        type(spec) in (SlidingWindowSpec, ChunkedLocalAttentionSpec)
        and spec.kv_quant_mode.value == 0  # type: ignore[attr-defined]
    )


def _is_plain(spec: KVCacheSpec) -> TypeGuard[FullAttentionSpec]:
    return (
        type(spec) is FullAttentionSpec
        and spec.sliding_window is None
        and spec.attention_chunk_size is None
        and not spec.non_causal
        and spec.head_size_v == spec.head_size
        and spec.kv_quant_mode.value == 0
    )


def _agree(flags: torch.Tensor) -> torch.Tensor:
    """Of every rank's flags the largest. vLLM reads the reports of one rank only, and a policy may
    fail on the heads of another."""
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, get_tp_group().device_group)
    return flags
