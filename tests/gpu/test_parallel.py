# SPDX-License-Identifier: Apache-2.0
"""Two GPUs: tensor, pipeline and data parallel, with NCCL, runner V2, graphs, async scheduling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip("needs two CUDA devices", allow_module_level=True)

from vllm import SamplingParams

from benchmarks.offline import SHAPE
from kvcompress_vllm.reporting.metrics import StepReport
from tests.gpu.test_echo import alike
from tests.gpu.test_engine import PAIRS, PROMPTS, gpu_engine, right
from tests.integration.engines import greedy
from tests.integration.test_parallel import data_parallel, kept, told
from tests.integration.test_policy_faults import choosing
from tests.policies.installed import install_for_all

__all__ = ["told"]

pytestmark = pytest.mark.gpu

UNIFORM = {"ratio": 8, "policy": "kv_compress", "allocator": "uniform"}


@pytest.fixture(autouse=True)
def integrity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")


@pytest.mark.parametrize("page_dtype", ["auto", "fp8"])
def test_tensor_parallel(page_dtype: str) -> None:
    """Heads that do not compete keep (nearly) what they keep on one rank: products are summed over
    ranks in another order. Done again, everything is the same, on every rank."""
    options = {**UNIFORM, "page_dtype": page_dtype}
    with gpu_engine(options) as llm:
        (alone,) = kept(llm, PROMPTS[0])
    with gpu_engine(options, tensor_parallel_size=2) as llm:
        ranks = kept(llm, PROMPTS[0])
        llm.reset_prefix_cache()
        assert kept(llm, PROMPTS[0]) == ranks
        outputs = greedy(llm, PROMPTS, 16)
        assert right(llm, outputs) >= 18
    # The bundled model has two KV heads, one on each rank.
    assert [len(heads) for heads in ranks] == [6, 6]
    together = [heads for pair in zip(*ranks, strict=True) for heads in pair]
    assert alike([alone], [together]) > 0.97


def test_tensor_parallel_at_the_8b_shape() -> None:
    """Random weights: what is tested is that both ranks do what the scheduler says, twice alike."""
    prompts = [{"prompt_token_ids": [(7 * i + j) % 3000 + 1000 for j in range(1500 + 40 * i)]}
               for i in range(16)]  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, detokenize=False)
    arguments = {"model": str(SHAPE), "load_format": "dummy", "skip_tokenizer_init": True,
                 "max_model_len": 4096, "num_gpu_blocks_override": 1500}  # fmt: skip
    with gpu_engine({"ratio": 8, "interval": 2}, tensor_parallel_size=2, **arguments) as llm:
        found = []
        for _ in range(2):
            llm.reset_prefix_cache()
            llm.collective_rpc("kv_compress_record")
            # One at a time: what runs beside a request changes the shapes of products.
            outputs = [llm.generate([p], params, use_tqdm=False)[0] for p in prompts[:3]]
            records = llm.collective_rpc("kv_compress_record")
            found.append(
                ([o.outputs[0].token_ids for o in outputs], [[*r.values()] for r in records])
            )
        assert found[0] == found[1]
        first, second = found[0][1]
        assert [sum(map(len, a)) for a in first] == [sum(map(len, b)) for b in second]
        assert all(len(heads) == 32 * 4 for heads in [*first, *second])
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == 96 for output in outputs)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_pipeline_parallel(
    asynchronous: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: list[StepReport],
) -> None:
    """Stages of two and four layers; a policy that fails on the first; recompressions, pressure."""
    install_for_all(tmp_path, monkeypatch, first="tests.policies.faulty:LateRaisesOnRank0")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "2,4")
    options = {"ratio": 8, "interval": 2, "allow_policies": True}
    arguments: dict[str, Any] = {"num_gpu_blocks_override": 400, "async_scheduling": asynchronous}
    arguments["disable_log_stats"] = False
    with gpu_engine(options, pipeline_parallel_size=2, **arguments) as llm:
        assert right(llm, greedy(llm, PROMPTS, 16)) >= 18
        outputs = greedy(llm, PROMPTS, 300, ignore_eos=True)
        assert all(len(tokens) == 300 for tokens in outputs) and right(llm, outputs) >= 18
        params = [choosing(None, kv_compress_mass=0.9), choosing("first")]
        by_mass, failed = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert by_mass.outputs[0].text.strip().startswith(PAIRS[0][1])
    assert failed.outputs[0].stop_reason == "kv_compress: score raised KeyError: 'no such channel'"
    assert sum(len(report.measured) for report in told) > 40
    pages = [report.kept_pages for report in told if report.measured_requests]
    assert pages and {len(layers) for layers in pages} == {6}
    for layers in pages:
        assert 2 * sum(map(sum, layers[:2])) == sum(map(sum, layers[2:])) > 0


def test_data_parallel(tmp_path: Path) -> None:
    # Beside other engines.
    data_parallel(tmp_path, "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", "1G")


def test_pipeline_and_ratio_1_give_the_tokens_of_one_gpu() -> None:
    with gpu_engine(None) as llm:
        expected = greedy(llm, PROMPTS[:8], 16)
    with gpu_engine({"ratio": 1}, pipeline_parallel_size=2) as llm:
        assert greedy(llm, PROMPTS[:8], 16) == expected
