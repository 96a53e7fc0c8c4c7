# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA wheel on a machine without GPU: its CPU platform with what the wheel lacks.

The wheel carries none of the CPU kernels, so this supplies the ops that a dense decoder looks up or
calls in any case and keeps all others on PyTorch; attention runs on our own backend.

It is made for a quick start. vLLM's CPU sampler is compiled by TorchInductor even with
``--enforce-eager``, which is most of the half minute that stock start-up spends "warming up"; here
nothing is compiled. And one rank runs inside the engine process: vLLM's separate CPU worker costs
another import of everything and, on two cores, leaves the model only one of them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from kvcompress_vllm.integration.cpu import kernels, mamba, newer, rejection

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_BACKEND = "kvcompress_vllm.integration.worker.attention.KVCompressBackend"
_LOCAL_BACKEND = "kvcompress_vllm.integration.cpu.attention.LocalCpuBackend"
_PLAIN_BACKEND = "kvcompress_vllm.integration.cpu.attention.PlainCpuBackend"
_KV_CACHE_BYTES = 1 << 30
"""KV cache on CPU unless the user sizes it."""


class KVCompressCpuPlatform(CpuPlatform):
    """Active only where no platform of vLLM's own is (see ``plugin.cpu_platform``)."""

    ray_device_key = "GPU"
    """What Ray counts, of which nodes may claim to have some: ``ray start --num-gpus 2``."""

    @classmethod
    def import_kernels(cls) -> None:
        # A library of vLLM's for quantised weights has every process compile its CUDA launcher in
        # the background, which without libcuda takes a core for a minute and then does not link.
        os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
        kernels.register()
        newer.claim_no_amx()
        rejection.mend_expand()

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        newer.mend_slot_mapping()
        newer.mend_kernel_scan()
        super().register_triton_kernel_overrides()

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        # Compression selects our backend, as on any platform.
        if getattr(selected_backend, "name", None) != "CUSTOM":
            return _PLAIN_BACKEND
        return _LOCAL_BACKEND if attn_selector_config.has_sliding_window else _BACKEND

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: VllmConfig) -> None:
        mamba.install()  # the model is built by now, and nothing has run
        super().update_block_size_for_backend(vllm_config)

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        from vllm.config import CompilationMode  # not importable while platforms are resolved

        compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
        # vLLM's custom ops are kernels that the wheel lacks on CPU; "none" selects PyTorch.
        compilation.custom_ops[:] = ["none"]
        compilation.mode = CompilationMode.NONE
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # for the engine process, which is spawned
        cache = vllm_config.cache_config
        default = type(cache).gpu_memory_utilization
        if cache.kv_cache_memory_bytes is None and cache.gpu_memory_utilization == default:
            # vLLM would ask for 92% of all memory, and fail where something else runs.
            cache.kv_cache_memory_bytes = _KV_CACHE_BYTES
        backend = parallel.distributed_executor_backend
        method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD")
        super().check_and_update_config(vllm_config)
        if method == "fork":
            # vLLM's CPU platform insists on "spawn", because OpenMP does not survive a fork once it
            # has run; a server that only starts has not run it, and a spawned engine imports
            # everything a second time. So an explicit wish stands (`make serve` has it).
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = method
        if backend == "uni":
            parallel.distributed_executor_backend = "uni"
        if max(parallel.world_size, parallel.data_parallel_size) > 1:
            # vLLM wants a NUMA node per rank; without a wish of the user, share the cores.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
