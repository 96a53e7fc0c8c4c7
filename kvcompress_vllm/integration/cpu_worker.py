# SPDX-License-Identifier: Apache-2.0
"""The CPU worker with compression. Its own module: vLLM's CPU worker must be imported first."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip

from vllm.platforms import current_platform

from kvcompress_vllm.integration.cpu_platform import KVCompressCpuPlatform
from kvcompress_vllm.integration.worker import KVCompressWorkerMixin


class KVCompressCPUWorker(KVCompressWorkerMixin, CPUWorker):
    """Compression on a machine without GPU."""

    def determine_available_memory(self) -> int:
        if isinstance(current_platform, KVCompressCpuPlatform):
            # vLLM warms up to compile; on this platform nothing is compiled, and the dummy batch of
            # the largest size only delays the first request.
            self.model_runner.warming_up_model = lambda: None
        return super().determine_available_memory()
