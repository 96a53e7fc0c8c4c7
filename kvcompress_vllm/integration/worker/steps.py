# SPDX-License-Identifier: Apache-2.0
"""A step of the runner with compression: the plan before it, the reports after it.

Stands before two methods of the model runner, not of the worker: Ray's compiled graphs
(``VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0``) call the runner past its worker.

Under pipeline parallelism vLLM reads the output of the last stage. Every other stage gives its
reports to the next, with the activations that it sends there anyway; nothing waits for it. A step
without tokens sends none: its reports then go with the next step's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.sequence import IntermediateTensors
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput

from kvcompress_vllm.compression.pending import Parcel, PendingReports
from kvcompress_vllm.integration.worker import reports
from kvcompress_vllm.records.plan import StepPlan

_NUMBERS, _CONTENTS = "kv_compress", "kv_compress_contents"
"""Beside the activations: a tensor, and what it is made of."""


class Steps:
    """Carries out every step's plan on one rank, and sends the reports on their way.

    Args:
        runner: of either version, whose ``execute_model`` and ``sample_tokens`` are replaced.
        start: carries out the plan before the forward.
        end: told when the forward has been queued.
    """

    def __init__(
        self,
        runner: Any,
        start: Callable[[StepPlan], Sequence[PendingReports]],
        end: Callable[[], None],
    ) -> None:
        self._start, self._end = start, end
        self._stock_execute, self._stock_sample = runner.execute_model, runner.sample_tokens
        self._pending: list[PendingReports] = []
        """Of the step that is under way; of earlier ones, too, where stages wait for each other."""
        runner.execute_model, runner.sample_tokens = self.execute_model, self.sample_tokens

    @torch.inference_mode()
    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: IntermediateTensors | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        plan = getattr(scheduler_output, "kv_compress", None)
        if plan:
            self._pending += self._start(plan)
        # Looking into what is received waits for it; plans are the same on all ranks.
        if intermediate_tensors is not None and self._pending:
            join(self._pending, intermediate_tensors)
        try:
            output = self._stock_execute(scheduler_output, intermediate_tensors, *args, **kwargs)
        finally:
            self._end()
        if isinstance(output, IntermediateTensors):
            pending, self._pending = self._pending, []
            return with_parcels(output, pending, get_tp_group().world_size)
        return self._with_reports(output)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None, *args: Any, **kwargs: Any) -> Any:
        return self._with_reports(self._stock_sample(grammar_output, *args, **kwargs))

    def _with_reports(self, output: Any) -> Any:
        if output is None or not self._pending or not self._complete():
            return output  # the step is not over yet, or other stages have not been heard
        pending, self._pending = self._pending, []
        return reports.attach(output, pending)

    def _complete(self) -> bool:
        group = get_pp_group()
        return group.is_last_rank and (group.is_first_rank or self._pending[-1].joined)


def with_parcels(
    output: IntermediateTensors, pending: Sequence[PendingReports], ranks: int
) -> IntermediateTensors:
    """The activations for the next stage with the reports of this one.

    Args:
        ranks: tensor parallel ones. vLLM sends a part from each of what divides by their number,
            as if they all had the same; these numbers are each rank's own.
    """
    if not pending:
        return output
    parcels = [item.parcel() for item in pending]
    numbers = torch.cat([parcel.numbers for parcel in parcels])
    if ranks > 1:
        numbers = torch.nn.functional.pad(numbers, (0, ranks - numbers.numel() % ranks + 1))
    contents = [(p.numbers.numel(), p.messages, p.layers) for p in parcels]
    # Not into the runner's own, which a CUDA graph may write again.
    sent: dict[str, Any] = {**output.tensors, _NUMBERS: numbers, _CONTENTS: contents}
    return IntermediateTensors(sent)


def join(pending: Sequence[PendingReports], received: IntermediateTensors) -> None:
    """Take the reports of earlier stages out of what they sent.

    Raises:
        RuntimeError: they are not of the same compressions.
    """
    tensors: dict[str, Any] = received.tensors
    contents, numbers = tensors.pop(_CONTENTS, ()), tensors.pop(_NUMBERS, None)
    if len(contents) != len(pending):
        raise RuntimeError(
            f"kv_compress: the pipeline stage before reports of {len(contents)} batches of "
            f"compressions, this one of {len(pending)}"
        )
    begin = 0
    for item, (count, messages, layers) in zip(pending, contents, strict=True):
        item.join(Parcel(numbers[begin : begin + count], messages, layers))
        begin += count
