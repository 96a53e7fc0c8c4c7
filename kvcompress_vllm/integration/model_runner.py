# SPDX-License-Identifier: Apache-2.0
"""The few things we need of vLLM's model runner, in one place per runner version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvcompress_vllm.integration.attention import KVCompressMetadataBuilder


class RunnerAdapter:
    """Model runner V1 (``v1/worker/gpu_model_runner.py``), which also runs on CPU."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def request_rows(self) -> dict[str, int]:
        """Row of every request in the current batch."""
        rows: dict[str, int] = self._runner.input_batch.req_id_to_index
        return rows

    def write_row_prefix(self, request_id: str, blocks: list[int]) -> None:
        """Replace the first blocks of a request's row, in the batch and in its saved state."""
        runner = self._runner
        runner.requests[request_id].block_ids[0][: len(blocks)] = blocks
        row = runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            runner.input_batch.block_table[0].block_table.np[row, : len(blocks)] = blocks

    def metadata_builders(self) -> Iterator[KVCompressMetadataBuilder]:
        """Every attention metadata builder of the runner."""
        for groups in self._runner.attn_groups:
            for group in groups:
                yield from group.metadata_builders
