# SPDX-License-Identifier: Apache-2.0
"""The CPU worker with compression. Its own module: vLLM's CPU worker must be imported first."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig

from kvcompress_vllm.integration.cpu import newer
from kvcompress_vllm.integration.cpu.platform import KVCompressCpuPlatform
from kvcompress_vllm.integration.worker.longest_request import LongestRequestMixin
from kvcompress_vllm.integration.worker.worker import KVCompressWorkerMixin


class KVCompressCPUWorker(LongestRequestMixin, KVCompressWorkerMixin, CPUWorker):
    """Compression on a machine without GPU."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if isinstance(current_platform, KVCompressCpuPlatform):
            newer.share_the_node(vllm_config.parallel_config)
        super().__init__(vllm_config, *args, **kwargs)

    def determine_available_memory(self) -> int:
        if isinstance(current_platform, KVCompressCpuPlatform):
            # vLLM warms up to compile; on this platform nothing is compiled, and the dummy batch of
            # the largest size only delays the first request.
            self.model_runner.warming_up_model = lambda: None
            self._make_receive_buffers()
        return super().determine_available_memory()

    def _make_receive_buffers(self) -> None:
        """What later pipeline stages receive into, which else that batch makes."""
        runner: Any = self.model_runner
        if not get_pp_group().is_first_rank:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.dtype, device=runner.device
            )

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        _rewind_seeds(self.model_runner)


def _rewind_seeds(cpu_runner: Any) -> None:
    """Let seeded requests be prefilled in chunks.

    vLLM draws a token after every chunk and takes the draw back by the offset of the request's
    generator; a CPU generator has none, and the attempt would end the engine.
    """
    stock_sample, stock_bookkeeping = cpu_runner._sample, cpu_runner._bookkeeping_sync

    def sample(*args: Any, **kwargs: Any) -> Any:
        discarded = cpu_runner.discard_request_mask.np
        generators = cpu_runner.input_batch.generators
        states = [(g, g.get_state()) for index, g in generators.items() if discarded[index]]
        output = stock_sample(*args, **kwargs)
        for generator, state in states:
            generator.set_state(state)
        return output

    def bookkeeping(*args: Any, **kwargs: Any) -> Any:
        batch = cpu_runner.input_batch
        generators, batch.generators = batch.generators, {}
        try:
            return stock_bookkeeping(*args, **kwargs)
        finally:
            batch.generators = generators

    cpu_runner._sample = sample
    cpu_runner._bookkeeping_sync = bookkeeping
