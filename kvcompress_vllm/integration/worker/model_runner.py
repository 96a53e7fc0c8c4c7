# SPDX-License-Identifier: Apache-2.0
"""The few things we need of vLLM's model runners, in one place per runner version."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from kvcompress_vllm.cache.transfer import to_device
from kvcompress_vllm.integration.compat.releases import batch_order_is_told
from kvcompress_vllm.integration.worker.metadata import KVCompressMetadataBuilder


class RunnerAdapter(ABC):
    """What a step needs of the runner.

    Args:
        runner: vLLM's.
        group: which of its cache groups is compressed; the others have rows of their own.
    """

    def __init__(self, runner: Any, group: int = 0) -> None:
        self._runner = runner
        self.group = group

    @abstractmethod
    def request_rows(self, common: CommonAttentionMetadata) -> dict[str, int]:
        """Row of every request in the batch whose metadata is being built."""

    @abstractmethod
    def write_row_prefixes(self, prefixes: Mapping[str, list[int]]) -> None:
        """Replace the first blocks of rows before the step updates them.

        Args:
            prefixes: block ids by request id.
        """

    def metadata_builders(self) -> Iterator[KVCompressMetadataBuilder]:
        """Every attention metadata builder of the compressed group."""
        for group in self._runner.attn_groups[self.group]:
            yield from group.metadata_builders

    def draft_builders(self) -> Iterator[KVCompressMetadataBuilder]:
        """Those that a draft model has beside them, for its own steps."""
        for group in chain.from_iterable(self._draft_groups()):
            for builder in group.metadata_builders:
                # A draft model may have layers with a window, which are vLLM's.
                if isinstance(builder, KVCompressMetadataBuilder):
                    yield builder

    @abstractmethod
    def keep_out_of_full_graphs(self, scores_prompts: Callable[[], bool]) -> None:
        """Have steps of equal rows run in no full CUDA graph where ``scores_prompts`` says so."""

    @abstractmethod
    def _draft_groups(self) -> Iterable[Iterable[Any]]:
        """Attention groups of the draft model; empty where there is none."""


class RunnerV1(RunnerAdapter):
    """``v1/worker/gpu_model_runner.py``, which also runs on CPU."""

    def request_rows(self, common: CommonAttentionMetadata) -> dict[str, int]:
        rows: dict[str, int] = self._runner.input_batch.req_id_to_index
        return rows

    def write_row_prefixes(self, prefixes: Mapping[str, list[int]]) -> None:
        # In the batch, and in the state from which a request that skips a step comes back.
        runner = self._runner
        for request_id, blocks in prefixes.items():
            runner.requests[request_id].block_ids[self.group][: len(blocks)] = blocks
            row = runner.input_batch.req_id_to_index.get(request_id)
            if row is not None:
                table = runner.input_batch.block_table[self.group].block_table
                table.np[row, : len(blocks)] = blocks

    def keep_out_of_full_graphs(self, scores_prompts: Callable[[], bool]) -> None:
        dispatcher = self._runner.cudagraph_dispatcher
        stock = dispatcher.dispatch

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            if scores_prompts():
                # vLLM names it.
                kwargs["uniform_decode"] = False
            return stock(*args, **kwargs)

        dispatcher.dispatch = dispatch

    def _draft_groups(self) -> Iterable[Iterable[Any]]:
        return [getattr(getattr(self._runner, "drafter", None), "draft_attn_groups", ())]


class RunnerV2(RunnerAdapter):
    """``v1/worker/gpu/model_runner.py``, the default on CUDA: for dense models, from 0.29 on for
    all."""

    def __init__(self, runner: Any, group: int = 0) -> None:
        super().__init__(runner, group)
        self._rows: dict[str, int] = {}
        if batch_order_is_told():
            return
        stock = runner.model_state.prepare_attn

        def prepare_attn(input_batch: Any, *args: Any, **kwargs: Any) -> Any:
            # The runner sorts its batch on every step; the metadata builder is not told how.
            self._rows = {request_id: row for row, request_id in enumerate(input_batch.req_ids)}
            return stock(input_batch, *args, **kwargs)

        runner.model_state.prepare_attn = prepare_attn

    def request_rows(self, common: CommonAttentionMetadata) -> dict[str, int]:
        if not batch_order_is_told():
            return self._rows
        told: Any = common  # not every release has the field
        if told.req_idx is None:
            raise RuntimeError("kv_compress: runner V2 does not say which request is in which row")
        names = self._runner.req_states.index_to_req_id
        places = told.req_idx.tolist()
        return {names[place]: row for row, place in enumerate(places) if place in names}

    def write_row_prefixes(self, prefixes: Mapping[str, list[int]]) -> None:
        # In stream order: after the step before has read the rows, and before the runner applies
        # its own writes of this step, which lie behind. Not staged with them: vLLM has room for one
        # staged write per row, and a row that is packed may also grow in the same step.
        if not prefixes:
            return
        table = self._runner.block_tables.block_tables[self.group].gpu
        rows, width = self._runner.req_states.req_id_to_index, table.shape[1]
        places = chain.from_iterable(
            range(rows[request_id] * width, rows[request_id] * width + len(blocks))
            for request_id, blocks in prefixes.items()
        )
        table.view(-1)[to_device(list(places), torch.int64, table.device)] = to_device(
            list(chain.from_iterable(prefixes.values())), table.dtype, table.device
        )

    def keep_out_of_full_graphs(self, scores_prompts: Callable[[], bool]) -> None:
        manager = self._runner.cudagraph_manager
        stock = manager.dispatch

        def dispatch(
            num_reqs: int,
            num_tokens: int,
            uniform_token_count: int | None,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            uniform = None if scores_prompts() else uniform_token_count
            return stock(num_reqs, num_tokens, uniform, *args, **kwargs)

        manager.dispatch = dispatch

    def _draft_groups(self) -> Iterable[Iterable[Any]]:
        groups: Iterable[Iterable[Any]] = getattr(self._runner.speculator, "attn_groups", ())
        return groups


def draft_layers(runner: Any) -> Collection[str]:
    """Names of the attention layers of a runner's draft model; empty where there is none."""
    found: Collection[str]
    if hasattr(runner, "req_states"):
        found = getattr(runner.speculator, "draft_attn_layer_names", ())
    else:
        drafter = getattr(runner, "drafter", None)
        found = getattr(drafter, "_draft_attn_layer_names", ())
    return found


def adapt(runner: Any, group: int = 0) -> RunnerAdapter:
    """The adapter of a runner; call once per runner.

    Args:
        group: which of its cache groups is compressed.
    """
    return (RunnerV2 if hasattr(runner, "req_states") else RunnerV1)(runner, group)
