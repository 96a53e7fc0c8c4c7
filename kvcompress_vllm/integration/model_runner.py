# SPDX-License-Identifier: Apache-2.0
"""The few things we need of vLLM's model runners, in one place per runner version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from kvcompress_vllm.integration.attention import KVCompressMetadataBuilder


class RunnerAdapter(ABC):
    """What a step needs of the runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    @abstractmethod
    def request_rows(self) -> dict[str, int]:
        """Row of every request in the batch whose metadata is being built."""

    @abstractmethod
    def write_row_prefix(self, request_id: str, blocks: list[int]) -> None:
        """Replace the first blocks of a request's row before the step updates it."""

    def metadata_builders(self) -> Iterator[KVCompressMetadataBuilder]:
        """Every attention metadata builder of the runner."""
        for groups in self._runner.attn_groups:
            for group in groups:
                yield from group.metadata_builders


class RunnerV1(RunnerAdapter):
    """``v1/worker/gpu_model_runner.py``, which also runs on CPU."""

    def request_rows(self) -> dict[str, int]:
        rows: dict[str, int] = self._runner.input_batch.req_id_to_index
        return rows

    def write_row_prefix(self, request_id: str, blocks: list[int]) -> None:
        # In the batch, and in the state from which a request that skips a step comes back.
        runner = self._runner
        runner.requests[request_id].block_ids[0][: len(blocks)] = blocks
        row = runner.input_batch.req_id_to_index.get(request_id)
        if row is not None:
            runner.input_batch.block_table[0].block_table.np[row, : len(blocks)] = blocks


class RunnerV2(RunnerAdapter):
    """``v1/worker/gpu/model_runner.py``, the default on CUDA for dense models."""

    def __init__(self, runner: Any) -> None:
        super().__init__(runner)
        self._rows: dict[str, int] = {}
        stock = runner.model_state.prepare_attn

        def prepare_attn(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            # The runner sorts its batch on every step; the metadata builder is not told how.
            self._rows = {request_id: row for row, request_id in enumerate(input_batch.req_ids)}
            return stock(input_batch, *args, **kwargs)

        runner.model_state.prepare_attn = prepare_attn

    def request_rows(self) -> dict[str, int]:
        return self._rows

    def write_row_prefix(self, request_id: str, blocks: list[int]) -> None:
        # Staged; the runner applies it with its own writes of this step.
        index = self._runner.req_states.req_id_to_index[request_id]
        self._runner.block_tables.block_tables[0].stage_write(index, 0, blocks)


def adapt(runner: Any) -> RunnerAdapter:
    """The adapter of a runner; call once per runner."""
    return RunnerV2(runner) if hasattr(runner, "req_states") else RunnerV1(runner)
