# SPDX-License-Identifier: Apache-2.0
"""Rows of runner V2, in vLLM's own block tables without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables

from kvcompress_vllm.integration.worker.model_runner import RunnerV2

ROWS, WIDTH = 4, 12


class HostBuffer:
    """vLLM's buffer in host memory that a device can read; here the host is the device."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = self.uva = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()


class ApplyWrites:
    """vLLM's kernel of the same name."""

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(output, stride, indices, starts, contents, ends, groups, **_: Any) -> None:
            assert groups is None and stride == output.stride(0)
            for i in range(grid[0]):
                part = contents[ends[i - 1] if i else 0 : ends[i]]
                output[indices[i], starts[i] : starts[i] + len(part)] = part

        return launch


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> BlockTables:
    monkeypatch.setattr(buffer_utils, "UvaBuffer", HostBuffer)
    monkeypatch.setattr(buffer_utils, "_apply_write_kernel", ApplyWrites())
    return BlockTables([16], ROWS, 64, [WIDTH], torch.device("cpu"), [16])


def runner(tables: BlockTables) -> RunnerV2:
    return RunnerV2(
        SimpleNamespace(
            block_tables=tables,
            req_states=SimpleNamespace(
                req_id_to_index={f"r{i}": ROWS - 1 - i for i in range(ROWS)}
            ),
            model_state=SimpleNamespace(prepare_attn=None),
        )
    )


def test_every_row_is_packed_and_grows_in_one_step(tables: BlockTables) -> None:
    """Twice as many writes as there are rows: more than vLLM's staging buffers hold."""
    v2 = runner(tables)
    for row in range(ROWS):
        tables.append_block_ids(row, ([10 * row + j for j in range(1, 9)],), overwrite=True)
    tables.apply_staged_writes()

    v2.write_row_prefixes({f"r{i}": [50 + i, 60 + i, *[0] * (4 + i % 2)] for i in range(ROWS)})
    for row in range(ROWS):
        tables.append_block_ids(row, ([90 + row],), overwrite=False)
    tables.apply_staged_writes()

    assert tables.block_tables[0].gpu.tolist() == [
        [53, 63, 0, 0, 0, 0, 0, 8, 90, 0, 0, 0],
        [52, 62, 0, 0, 0, 0, 17, 18, 91, 0, 0, 0],
        [51, 61, 0, 0, 0, 0, 0, 28, 92, 0, 0, 0],
        [50, 60, 0, 0, 0, 0, 37, 38, 93, 0, 0, 0],
    ]
    assert tables.num_blocks.np.tolist() == [[9] * ROWS]


def test_no_row_is_packed(tables: BlockTables) -> None:
    tables.append_block_ids(1, ([7, 8],), overwrite=True)
    runner(tables).write_row_prefixes({})
    tables.apply_staged_writes()
    assert tables.block_tables[0].gpu[1, :3].tolist() == [7, 8, 0]
