# SPDX-License-Identifier: Apache-2.0
"""What attention layers are told of a step that speculates; no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.integration.worker.attention import KVCompressImpl
from kvcompress_vllm.integration.worker.cuda_attention import KVCompressCudaMetadataBuilder
from kvcompress_vllm.integration.worker.metadata import StepContext, observe_unverified
from kvcompress_vllm.integration.worker.model_runner import RunnerV1, RunnerV2
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Observation, Span

WINDOW = 8


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("window", [1, 3, WINDOW])
@pytest.mark.parametrize("late", range(5))
def test_places_of_queries_that_come_earlier(late: int, window: int) -> None:
    """As if the scheduler had known what is rejected; the window may be shorter than a step."""
    planned = [
        Observation("a", 2, 100, 98, observe_until=104, unverified=4),
        Observation("b", 0, 200, 190, observe_until=300, unverified=4),
    ]
    rows, starts, counts = [1, 0], [7, 0], [5, 3]
    index = torch.full((15,), -1, dtype=torch.int32)
    expected = index.clone()
    seq_lens = ints(0, 0)
    observed = []
    for item, row, begin, count in zip(planned, rows, starts, counts, strict=True):
        first = item.first_token - late
        seq_lens[row] = first + count
        observed.append((item, row, begin, begin + count))
        positions = item._replace(first_token=first).positions(count, window)
        for position, place in zip(positions, item.places(positions, window), strict=True):
            expected[begin + position - first] = place
    observe_unverified(index, observed, seq_lens, window)
    assert index.equal(expected)
    assert (index >= 0).sum() >= min(window, 4)


class Dispatches:
    """What a runner asks for a CUDA graph."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def dispatch(self, *args: Any, **kwargs: Any) -> None:
        self.asked.append((args, kwargs))


@pytest.mark.parametrize("scores", [False, True])
def test_prompts_that_are_scored_run_in_no_full_graph(scores: bool) -> None:
    """A chunk of a prompt may be as long as a step of speculation."""
    state: Any = SimpleNamespace()
    context = StepContext(state, torch.empty(0), {}, lambda common: {})
    if scores:
        context.echoes = [Span("a", 0, 5)]
    first, second = Dispatches(), Dispatches()
    model_state = SimpleNamespace(prepare_attn=None)
    RunnerV1(SimpleNamespace(cudagraph_dispatcher=first)).keep_out_of_full_graphs(
        lambda: context.scores_prompts
    )
    RunnerV2(
        SimpleNamespace(cudagraph_manager=second, model_state=model_state)
    ).keep_out_of_full_graphs(lambda: context.scores_prompts)
    first.dispatch(num_tokens=10, uniform_decode=True, has_lora=False)
    second.dispatch(2, 10, 5, num_active_loras=0)
    assert first.asked == [
        ((), {"num_tokens": 10, "uniform_decode": not scores, "has_lora": False})
    ]
    assert second.asked == [((2, 10, None if scores else 5), {"num_active_loras": 0})]


def common(*lengths: int) -> Any:
    """A batch whose rows compute so many tokens each."""
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return SimpleNamespace(
        num_reqs=len(lengths),
        num_actual_tokens=sum(lengths),
        max_query_len=max(lengths),
        max_seq_len=64,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.full((len(lengths),), 64, dtype=torch.int32),
        block_table_tensor=torch.arange(1, 1 + 4 * len(lengths), dtype=torch.int32).view(-1, 4),
        slot_mapping=torch.zeros(sum(lengths), dtype=torch.int64),
    )


def builders(drafts: int) -> tuple[StepContext, Any, Any]:
    """Of a model, and of its draft model's own steps, bound."""
    group = CacheGroup(3, 1, 2, 32, 16, 2, 1.0, draft_layers=1)
    state = PackedState(
        group, num_blocks=40, state_slots=3, observe_slots=1, window=WINDOW,
        dtype=torch.bfloat16, device=torch.device("cpu"),
    )  # fmt: skip
    names = {"a": 0, "b": 1, "draft": 2}
    context = StepContext(state, torch.empty(0), names, lambda _: {"r": 2, "s": 0})
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=64),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False)
        if drafts
        else None,
    )
    spec: Any = None
    made = [KVCompressCudaMetadataBuilder(spec, [], config, torch.device("cpu")) for _ in "ab"]
    made[0].bind(context)
    made[1].bind(context, drafts=True)
    return context, *made


def test_rows_of_a_speculating_step_are_decode_rows() -> None:
    for drafts, decodes in ((0, 1), (4, 3)):
        _, target, _ = builders(drafts)
        found = target.build(0, common(1, 5, 3, 6))
        assert len(found.seq_lens) == decodes and found.decode_query_len == 1 + drafts
        assert [rows.num_tokens for rows in found.prefills] == ([14] if not drafts else [6])


def test_a_draft_model_sees_which_rows_are_packed() -> None:
    """Its steps come when the plan is done with; of prompts that were packed inside, too."""
    context, target, draft = builders(4)
    context.state.owner[9] = 1  # of row 2
    context.packed_prefills = ["r"]
    context.observations = [Observation("s", 0, 60, 56)]
    found = target.build(0, common(4, 9, 8))
    assert [rows.packed for rows in found.prefills] == [False, True]
    assert (found.ring_index >= 0).sum() == 4
    context.packed_prefills, context.observations = [], []
    found = draft.build(0, common(4, 9, 8))
    assert [rows.packed for rows in found.prefills] == [False, True]
    assert found.prefills[1].state_slot.tolist() == [1]
    assert (found.ring_index == -1).all()
    steps = draft.build(0, common(1, 1, 1))
    assert steps.state_slot.tolist() == [-1, -1, 1] and not steps.prefills


def test_draft_layers_are_not_observed() -> None:
    context, _, _ = builders(4)
    impls = {name: KVCompressImpl(2, 32, 1.0, 1, logits_soft_cap=cap)
             for name, cap in [("a", None), ("b", None), ("draft", 3.0)]}  # fmt: skip
    for name, impl in impls.items():
        impl.bind(context, name)
    assert [impl.of_draft for impl in impls.values()] == [False, False, True]
    assert impls["draft"].logits["soft_cap"] == 3.0  # its own
