# SPDX-License-Identifier: Apache-2.0
"""Runner V2 without a GPU: our adapter and metadata builder under vLLM's own classes.

On GPUs V2 runs every model from vLLM 0.29 on; a CPU engine never touches it. Its block tables,
request table and the way from a batch to a metadata builder take CPU tensors; what cannot (buffers
that a device reads, one Triton kernel) is replaced by what says the same in PyTorch.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.integration.worker.cuda_attention import (
    KVCompressCudaBackend,
    KVCompressCudaMetadata,
    KVCompressCudaMetadataBuilder,
)
from kvcompress_vllm.integration.worker.metadata import StepContext
from kvcompress_vllm.integration.worker.model_runner import RunnerV2
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Observation, Span

ROWS, WIDTH = 4, 12
CPU = torch.device("cpu")


def call(function: Any, **arguments: Any) -> Any:
    """With those arguments that this release of vLLM takes."""
    taken = inspect.signature(function).parameters
    return function(**{name: value for name, value in arguments.items() if name in taken})


class HostBuffer:
    """vLLM's buffer in host memory that a device can read; here the host is the device."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        self.cpu = self.uva = torch.zeros(size, dtype=dtype)
        self.np = self.cpu.numpy()


class LaterHostBuffer(HostBuffer):
    """Likewise; from 0.29 on vLLM calls what it read before."""

    def __init__(self, size: Any, dtype: torch.dtype) -> None:
        super().__init__(size, dtype)
        self.uva = lambda n=None: self.cpu if n is None else self.cpu[:n]


class ApplyWrites:
    """vLLM's kernel of the same name."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(output, stride, indices, starts, contents, ends, groups, **_: Any) -> None:
            assert groups is None and stride == output.stride(0)
            for i in range(grid[0]):
                part = contents[ends[i - 1] if i else 0 : ends[i]]
                flat = output.view(output.shape[0], -1)
                flat[indices[i], starts[i] : starts[i] + len(part)] = part

        return launch


@pytest.fixture(autouse=True)
def host_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    later = callable(getattr(buffer_utils.UvaBuffer, "uva", None))
    monkeypatch.setattr(buffer_utils, "UvaBuffer", LaterHostBuffer if later else HostBuffer)
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: True)
    monkeypatch.setattr(buffer_utils, "_apply_write_kernel", ApplyWrites())


@pytest.fixture
def tables() -> BlockTables:
    return call(
        BlockTables,
        block_sizes=[16],
        max_num_reqs=ROWS,
        max_num_batched_tokens=64,
        max_num_blocks_per_group=[WIDTH],
        device=CPU,
        kernel_block_sizes=[16],
    )


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


LAYERS, HEADS, SIZE, WINDOW = 2, 2, 32, 4
LAYER_NAMES = [f"layer{i}" for i in range(LAYERS)]


class TextModelState(DefaultModelState):
    """vLLM's, as far as the way to a metadata builder reads it."""

    max_model_len = 64
    supports_mm_inputs = False
    encoder_cache = None


class Step:
    """A step of runner V2: from its request table and batch to our metadata, by vLLM's own code.

    Args:
        batch: (request, tokens in this step, sequence length), in the order of the batch.
        packed: first block and state slot of packed requests.
    """

    def __init__(
        self, batch: list[tuple[str, int, int]], packed: dict[str, tuple[int, int]] | None = None
    ) -> None:
        requests = RequestState(ROWS, 64, 64, 0, 100, CPU)
        for name in sorted(name for name, _, _ in batch):
            call(
                requests.add_request,
                req_id=name,
                prompt_len=8,
                all_token_ids=list(range(8)),
                num_computed_tokens=0,
                max_tokens=8,
            )
        state = TextModelState.__new__(TextModelState)
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=ROWS, max_num_batched_tokens=64),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=None,
        )
        builder = KVCompressCudaMetadataBuilder(None, LAYER_NAMES, config, CPU)
        self.groups = [
            [call(AttentionGroup, backend=KVCompressCudaBackend, layer_names=LAYER_NAMES,
                  kv_cache_spec=None, kv_cache_group_id=0, metadata_builders=[builder])]
        ]  # fmt: skip
        self.runner = SimpleNamespace(
            req_states=requests, model_state=state, attn_groups=self.groups, block_tables=None
        )
        self.adapter = RunnerV2(self.runner)
        packed_state = PackedState(
            CacheGroup(LAYERS, HEADS, 1, SIZE, 16, 4, 1.0), num_blocks=64,
            state_slots=ROWS, observe_slots=2, window=WINDOW, dtype=torch.float32,
            device=CPU,
        )  # fmt: skip
        self.context = StepContext(
            packed_state, torch.empty(0), {n: i for i, n in enumerate(LAYER_NAMES)},
            self.adapter.request_rows,
        )  # fmt: skip
        for found in self.adapter.metadata_builders():
            found.bind(self.context)
        self.batch = batch
        self.block_table = torch.arange(1, len(batch) * WIDTH + 1, dtype=torch.int32).view(
            -1, WIDTH
        )
        for name, (block, slot) in (packed or {}).items():
            packed_state.owner[block] = slot
            self.block_table[[n for n, _, _ in batch].index(name), 0] = block

    def metadata(self) -> KVCompressCudaMetadata:
        names, tokens, lengths = zip(*self.batch, strict=True)
        starts = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int32)
        table = self.runner.req_states.req_id_to_index
        count, total = len(names), int(starts[-1])
        batch = SimpleNamespace(
            req_ids=list(names),
            idx_mapping_np=np.array([table[name] for name in names], dtype=np.intp),
            num_reqs=count, num_reqs_after_padding=count,
            num_tokens=total, num_tokens_after_padding=total,
            num_scheduled_tokens=np.array(tokens), max_query_len=None,
            query_start_loc_np=starts, query_start_loc=torch.from_numpy(starts),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            dcp_local_seq_lens=None, positions=torch.zeros(total, dtype=torch.int64),
            is_prefilling_np=np.array([n > 1 for n in tokens]), prompt_lens=None,
            pcp=None, fast_prefill=None,
        )  # fmt: skip
        found = self.runner.model_state.prepare_attn(
            batch,
            CUDAGraphMode.NONE,
            (self.block_table,),
            torch.zeros(1, total, dtype=torch.int64),
            self.groups,
            SimpleNamespace(kv_cache_groups=[None]),
        )
        assert found.keys() == set(LAYER_NAMES)
        return found[LAYER_NAMES[0]]


def test_queries_are_observed_in_the_row_where_the_batch_has_them() -> None:
    """The batch is in another order than the request table; decode rows come first."""
    step = Step([("c", 1, 30), ("a", 1, 20), ("d", 6, 6), ("b", 5, 25)])
    assert list(step.runner.req_states.req_id_to_index) == ["a", "b", "c", "d"]
    step.context.observations = [
        Observation("a", 0, first_token=19, observe_from=0),
        Observation("b", 1, first_token=20, observe_from=22),
    ]
    meta = step.metadata()
    assert meta.num_decode_tokens == 2 and meta.num_actual_tokens == 13
    assert meta.ring_index is not None
    # Rows: c 0, a 1, d 2-7, b 8-12. Token 19 of a -> 0 * 4 + 3; tokens 22 to 24 of b -> 4 + 2, 3, 0
    assert meta.ring_index.tolist() == [-1, 3, *[-1] * 8, 6, 7, 4]
    (rows,) = meta.prefills
    assert (rows.packed, rows.first_token, rows.num_tokens) == (False, 2, 11)


def test_a_step_that_completes_a_segment_and_begins_the_next() -> None:
    """The queries of both wait in slots of their own, and what lies behind the border is scored."""
    step = Step([("a", 1, 20), ("b", 20, 270)])
    step.context.observations = [
        Observation("b", 0, first_token=250, observe_from=0, observe_until=256),
        Observation("b", 1, first_token=250, observe_from=256),
    ]
    step.context.echoes = [Span("b", 256, 270)]
    meta = step.metadata()
    assert meta.ring_index is not None and meta.echo is not None
    # Rows: a 0, b 1-20. Token 256 is in row 7; of each part the last four tokens are observed.
    assert meta.echo.segments.tolist() == [[1, 256, 270, 7]]
    found = [(row, place) for row, place in enumerate(meta.ring_index.tolist()) if place >= 0]
    first = [(1 + position - 250, position % 4) for position in range(252, 256)]
    assert found == first + [(1 + n - 250, 4 + n % 4) for n in range(266, 270)]


def test_what_a_step_leaves_to_be_scored_later() -> None:
    """The tokens behind what is scored count in the batch all the same."""
    step = Step([("a", 1, 20), ("b", 300, 550)])
    step.context.echoes = [Span("b", 250, 512, behind=38)]
    echo = step.metadata().echo
    # Rows: a 0, b 1-300; token 250 is in row 1.
    assert echo is not None and echo.segments.tolist() == [[1, 250, 256, 1], [1, 256, 512, 7]]


def test_packed_rows_are_found_in_the_batch() -> None:
    step = Step(
        [("d", 1, 30), ("b", 4, 20), ("a", 3, 6), ("c", 5, 25)], {"d": (60, 2), "a": (61, 1)}
    )
    step.context.packed_prefills = ["a"]
    meta = step.metadata()
    assert meta.state_slot.tolist() == [2]
    runs = [(r.packed, r.first_token, r.num_tokens, r.state_slot.tolist()) for r in meta.prefills]
    assert runs == [(False, 1, 4, [-1]), (True, 5, 3, [1]), (False, 8, 5, [-1])]


def test_a_request_that_is_not_in_the_batch() -> None:
    step = Step([("a", 1, 20), ("b", 5, 25)])
    step.context.observations = [Observation("z", 0, first_token=0, observe_from=0)]
    with pytest.raises(RuntimeError, match="observed request z is not in the batch"):
        step.metadata()
