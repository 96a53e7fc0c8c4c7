# SPDX-License-Identifier: Apache-2.0
"""vLLM's older executor on Ray, ``VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0``: compiled graphs."""

from __future__ import annotations

from vllm.v1.executor.ray_executor import RayDistributedExecutor

from kvcompress_vllm.integration.start.ray_nodes import check


class KVCompressRayExecutor(RayDistributedExecutor):
    """Looks at the nodes first."""

    def _init_executor(self) -> None:
        check(self, require_gpu_on_driver=True)
        super()._init_executor()
