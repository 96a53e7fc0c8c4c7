# SPDX-License-Identifier: Apache-2.0
"""Reports of the workers on their way back to the scheduler."""

from __future__ import annotations

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from kvcompress_vllm.integration.worker.reports import attach, reports_of
from kvcompress_vllm.records.report import Report
from tests.integration.engines import engine, greedy, samples, scheduler


class Pending:
    """Reports that must not be read before vLLM waits for its output."""

    def __init__(self) -> None:
        self.collected = 0

    def collect(self) -> list[str]:
        self.collected += 1
        return ["report"]


class Later(AsyncModelRunnerOutput):
    extra = 5

    def __init__(self, output: ModelRunnerOutput) -> None:
        self.output = output

    def get_output(self) -> ModelRunnerOutput:
        return self.output

    def get_kv_connector_output(self) -> str:
        """Abstract in vLLM's class from 0.33 on."""
        return "saved"


def test_an_asynchronous_output_is_not_waited_for() -> None:
    pending, output = Pending(), ModelRunnerOutput(["r"], {"r": 0}, [[1]])
    wrapped = attach(Later(output), [pending, pending])
    assert pending.collected == 0 and isinstance(wrapped, AsyncModelRunnerOutput)
    assert wrapped.extra == 5 and wrapped.get_kv_connector_output() == "saved"
    result = wrapped.get_output()
    assert reports_of(result) == ["report"] * 2 and result.sampled_token_ids == [[1]]


def test_the_empty_output_that_steps_share_stays_empty() -> None:
    result = attach(EMPTY_MODEL_RUNNER_OUTPUT, [Pending()])
    assert reports_of(result) == ["report"]
    assert reports_of(EMPTY_MODEL_RUNNER_OUTPUT) == []
    assert attach(EMPTY_MODEL_RUNNER_OUTPUT, []) is EMPTY_MODEL_RUNNER_OUTPUT


def test_reports_of_the_real_engine() -> None:
    """What comes back is what the worker kept."""
    prompts = [prompt for prompt, _ in samples("single", 900, 3)]
    reports: list[Report] = []
    with engine({"ratio": 6}) as llm:
        stock = scheduler(llm).update_from_output
        scheduler(llm).update_from_output = lambda step, output: (
            reports.extend(reports_of(output)) or stock(step, output)
        )
        llm.collective_rpc("kv_compress_record")
        greedy(llm, prompts, 3)
        (record,) = llm.collective_rpc("kv_compress_record")
    assert len(reports) == 3
    for report in reports:
        lengths = [len(keys) // 16 for keys in record[report.request_id]]
        assert [pages for layer in report.kept_pages for pages in layer] == lengths
        assert report.trigger == "prefill" and report.milliseconds > 0
        assert report.curve.blocks[-1] == report.num_tokens // 16
        assert 0 < report.lost < report.curve.lost[0] < 1
