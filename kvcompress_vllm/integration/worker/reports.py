# SPDX-License-Identifier: Apache-2.0
"""How reports of the workers travel back: as an attribute of vLLM's ``ModelRunnerOutput``.

Under asynchronous scheduling the output is read in another thread, after the step has been queued.
Reports are collected there as well, so that no step waits for them. vLLM takes the output of one
rank only: the first of the last pipeline stage's. Its reports hold what earlier stages said
(``steps.py``); those of the other tensor parallel ranks end with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from kvcompress_vllm.compression.pending import PendingReports
from kvcompress_vllm.records.report import Report, Scored

_ATTRIBUTE = "kv_compress"


class _WithReports(AsyncModelRunnerOutput):
    """vLLM's asynchronous output, and the reports of its step."""

    def __init__(self, output: AsyncModelRunnerOutput, pending: Sequence[PendingReports]) -> None:
        self._output: Any = output
        self._pending = pending

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def get_output(self) -> ModelRunnerOutput:
        return _attached(self._output.get_output(), self._pending)

    def get_kv_connector_output(self) -> Any:
        """What vLLM saves of a step whose output failed; abstract from 0.33 on, unknown before."""
        return self._output.get_kv_connector_output()


def attach(
    output: ModelRunnerOutput | AsyncModelRunnerOutput, pending: Sequence[PendingReports]
) -> ModelRunnerOutput | AsyncModelRunnerOutput:
    """The output of a step with its reports; itself where there are none."""
    if not pending:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        return _WithReports(output, pending)
    return _attached(output, pending)


def reports_of(output: ModelRunnerOutput) -> list[Report | Scored]:
    """What :func:`attach` added."""
    reports: list[Report | Scored] = getattr(output, _ATTRIBUTE, [])
    return reports


def _attached(output: ModelRunnerOutput, pending: Sequence[PendingReports]) -> ModelRunnerOutput:
    output = copy(output)  # vLLM shares one empty output between steps
    setattr(output, _ATTRIBUTE, [report for batch in pending for report in batch.collect()])
    return output
