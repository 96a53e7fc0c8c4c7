# SPDX-License-Identifier: Apache-2.0
"""The CPU worker with compression. Its own module: vLLM's CPU worker must be imported first."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker  # isort: skip

from kvcompress_vllm.integration.worker import KVCompressWorkerMixin


class KVCompressCPUWorker(KVCompressWorkerMixin, CPUWorker):
    """Compression on a machine without GPU."""
