# SPDX-License-Identifier: Apache-2.0
"""More than one rank, on CPU: tensor, pipeline and data parallel. Two GPUs: tests/gpu."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from vllm import SamplingParams
from vllm.sequence import IntermediateTensors

from kvcompress_vllm.cache.transfer import Stopwatch
from kvcompress_vllm.compression.failures import Failures
from kvcompress_vllm.compression.pending import PendingReports
from kvcompress_vllm.integration.frontend.prometheus import KVCompressStatLogger
from kvcompress_vllm.integration.worker.steps import join, with_parcels
from kvcompress_vllm.records.plan import Compression
from kvcompress_vllm.reporting.metrics import StepReport
from tests.integration.engines import engine, samples, transformers_greedy
from tests.integration.heads import save_head
from tests.integration.simulation import ngram
from tests.integration.test_policy_faults import choosing
from tests.integration.test_server import complete, serve
from tests.integration.test_sharing_engine import answer, tokens
from tests.policies.installed import install_for_all


def pending(layers: int, lost: list[float], pages: int, failed: str | None = None) -> Any:
    """Of one request on a stage with so many layers of two heads."""
    item = Compression("r", 0, 0, 64, 0, 0, 4, [1, 2, 3, 4], [5, 6])
    failures = Failures([item])
    if failed:
        failures.has(0, failed)  # type: ignore[arg-type]
    kept = torch.full((1, layers, 2), pages, dtype=torch.int32)
    numbers = torch.tensor(lost, dtype=torch.float64)
    watch = Stopwatch(torch.device("cpu"))
    return PendingReports([item], [[1, 2, 4]], numbers, kept, watch, failures)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_stages_hand_their_reports_on(ranks: int) -> None:
    """Three stages of one, two and three layers; the first one's policy failed."""
    sent = IntermediateTensors({"hidden_states": torch.zeros(4, 8)})
    for stage, (lost, failed) in enumerate([(0.6, "no"), (0.3, None), (0.0, None)]):
        own = pending(stage + 1, [lost, lost / 2, 0], stage + 1, failed)
        if stage > 0:
            numel = sent.tensors["kv_compress"].numel()
            assert ranks == 1 or numel % ranks, "vLLM would send a part of it"
            join([own], sent)
            assert sent.tensors.keys() == {"hidden_states"}
        sent = with_parcels(sent, [own], ranks)
    (report,) = own.collect()
    assert report.kept_pages == [[1, 1]] + [[2, 2]] * 2 + [[3, 3]] * 3
    assert report.curve.lost == pytest.approx([0.2, 0.1, 0]) and report.failure == "no"
    with pytest.raises(RuntimeError, match="reports of 1 batches of compressions, this one of 0"):
        join([], sent)


@pytest.fixture(autouse=True)
def engines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine with several ranks in this process, sockets would stay that block the next."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    if os.environ.get("OMP_NUM_THREADS") == "1":
        # An import of vLLM less for each rank. Threads of OpenMP would not survive a fork.
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[StepReport]:
    """What the front end is told of every step from now on."""
    found: list[StepReport] = []
    stock = KVCompressStatLogger.record

    def record(self: Any, stats: Any, *args: Any, **kwargs: Any) -> None:
        if stats is not None:
            found.append(stats.kv_compress)
        stock(self, stats, *args, **kwargs)

    monkeypatch.setattr(KVCompressStatLogger, "record", record)
    return found


def test_pipeline_parallel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[StepReport]
) -> None:
    """Stages of two and four layers. What the first one knows comes back through the last."""
    install_for_all(tmp_path, monkeypatch, first="tests.policies.faulty:LateRaisesOnRank0")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,4")
    pairs = samples("single", 900, 3)
    prompts = [prompt for prompt, _ in pairs]
    params = [
        choosing(None, kv_compress_ratio=1),
        choosing(None),
        choosing(None, kv_compress_mass=0.95),
        choosing("first"),
    ]
    for longer in params[1:3]:  # than it takes until their compression is reported
        longer.ignore_eos, longer.max_tokens = True, 32
    options = {"ratio": 4, "policy": "kv_compress", "allow_policies": True}
    with engine(options, pipeline_parallel_size=2, disable_log_stats=False) as llm:
        llm.collective_rpc("kv_compress_record")
        outputs = llm.generate([*prompts, prompts[0]], params, use_tqdm=False)
        first, second = llm.collective_rpc("kv_compress_record")
    exact, compressed, by_mass, failed = (output.outputs[0] for output in outputs)
    (expected,) = transformers_greedy((prompts[0],), torch.float32, 12)
    assert list(exact.token_ids) == expected
    assert compressed.text.strip().startswith(pairs[1][1])
    assert by_mass.text.strip().startswith(pairs[2][1])
    assert failed.finish_reason == "error"
    assert failed.stop_reason == "kv_compress: score raised KeyError: 'no such channel'"
    assert [output.kv_compress.compressions for output in outputs] == [0, 1, 1, 1]
    assert first.keys() == second.keys() and len(first) == 3
    for request_id, heads in first.items():
        assert [len(heads), len(second[request_id])] == [4, 8]
        assert 2 * sum(map(len, heads)) == sum(map(len, second[request_id]))
    # Two, but vLLM's offline engine drops the statistics of steps that no request has a token of.
    assert sum(len(report.measured) for report in told) in (1, 2)
    pages = [report.kept_pages for report in told if report.measured_requests]
    assert pages and {len(layers) for layers in pages} == {6}
    for layers in pages:
        assert 2 * sum(map(sum, layers[:2])) == sum(map(sum, layers[2:])) > 0


def kept(llm: Any, prompt: str) -> list[list[list[int]]]:
    """Kept keys of every (layer, head), by rank."""
    llm.collective_rpc("kv_compress_record")
    llm.generate([prompt], choosing(None), use_tqdm=False)
    found = []
    for record in llm.collective_rpc("kv_compress_record"):
        (heads,) = record.values()
        found.append(heads)
    return found


def test_tensor_parallel() -> None:
    """Heads that do not compete keep on their rank what they keep on one; the answers are the
    same, and so is everything when it is done again."""
    ((prompt, answer),) = samples("multikey", 900, 1)
    options = {"ratio": 8, "policy": "kv_compress", "allocator": "uniform"}
    with engine(options) as llm:
        (alone,) = kept(llm, prompt)
        expected = llm.generate([prompt], choosing(None), use_tqdm=False)[0].outputs[0]
    assert expected.text.strip().startswith(answer)
    with engine(options, tensor_parallel_size=2) as llm:
        ranks = kept(llm, prompt)
        again = kept(llm, prompt)
        output = llm.generate([prompt], choosing(None), use_tqdm=False)[0].outputs[0]
    assert [len(heads) for heads in ranks] == [6, 6] and again == ranks
    assert [heads for pair in zip(*ranks, strict=True) for heads in pair] == alone
    assert output.token_ids == expected.token_ids


def test_tensor_parallel_turns() -> None:
    """Two conversations at once on two ranks. An answer passes a mark, a message the end of a
    segment, and one a mark: what each rank keeps there is what it keeps of one pass over all."""
    options = {"ratio": 8, "min_prompt_tokens": 64, "recent": 16, "context_stride": 512}
    prompts = [tokens(80 + index, 500) for index in range(2)]
    with engine(
        options, tensor_parallel_size=2, max_num_batched_tokens=1200, enable_prefix_caching=True
    ) as llm:

        def recorded(max_tokens: int) -> tuple[Any, Any, list[Any]]:
            llm.collective_rpc("kv_compress_record")
            said, usages = answer(llm, prompts, max_tokens)
            ranks = llm.collective_rpc("kv_compress_record")
            return said, usages, [list(record.values()) for record in ranks]

        for turn, message in enumerate((300, 260, 0)):
            said, usages, found = recorded(16)
            assert all(usage.shared_blocks for usage in usages) == (turn > 0)
            if message:
                prompts = [
                    [*prompt, *ids, *tokens(90 + 2 * turn + index, message)]
                    for index, (prompt, ids) in enumerate(zip(prompts, said, strict=True))
                ]
        assert llm.reset_prefix_cache()
        again, usages, anew = recorded(16)
        assert not any(usage.shared_blocks for usage in usages)
        assert [len(requests) for requests in found] == [2, 2]
        assert again == said and anew == found


def test_tensor_parallel_beside_speculation(tmp_path: Path) -> None:
    """Rows of several tokens, and a draft layer, on two ranks: answers are as without."""
    head = {"method": "eagle", "model": save_head(tmp_path), "num_speculative_tokens": 4}
    prompts = [prompt for task in ("single", "kv40", "copy") for prompt, _ in samples(task, 500, 2)]
    options = {"ratio": 8, "min_prompt_tokens": 64, "interval": 2, "recent": 16}
    sampling = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    expected = None
    for drafts in (None, ngram(4), head):
        with engine(
            options, tensor_parallel_size=2, speculative_config=drafts, disable_log_stats=False
        ) as llm:
            for _ in range(2):  # the second time with prefix hits
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
                found = [list(output.outputs[0].token_ids) for output in outputs]
                expected = expected or found
                assert found == expected
                assert min(output.kv_compress.compressions for output in outputs) > 1
            counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        if drafts is not None:
            assert counted["vllm:spec_decode_num_draft_tokens"] > 100


def test_data_parallel(tmp_path: Path) -> None:
    data_parallel(tmp_path)


def data_parallel(tmp_path: Path, *more: str) -> None:
    """Two engines behind one server: metrics of each, and the page's sums."""
    pairs = samples("single", 500, 6)
    flags = ("--kv-compress", "ratio=8", "--data-parallel-size", "2", "--api-server-count", "1")
    with serve(tmp_path, *flags, *more) as server:
        assert [complete(server, prompt) for prompt, _ in pairs] == [a for _, a in pairs]
        text = httpx.get(f"{server.url}/metrics").text
        page = httpx.get(f"{server.url}/kv-compress/data").json()
    counted: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            if name == "kv_compress:compressions_total":
                counted[labels["engine"]] = counted.get(labels["engine"], 0) + value
    assert counted.keys() == {"0", "1"} and min(counted.values()) > 0
    assert sum(counted.values()) == len(pairs)
    assert page["engines"] == 2 and page["totals"]["compressed_requests"] == len(pairs)
    assert page["by_engine"].keys() == {"0", "1"}
    assert page["now"] == {
        key: sum(engine[key] for engine in page["by_engine"].values()) for key in page["now"]
    }
