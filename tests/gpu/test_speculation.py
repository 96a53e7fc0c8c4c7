# SPDX-License-Identifier: Apache-2.0
"""Speculation on a GPU: n-grams and EAGLE heads, both model runners, graphs, steps in flight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.gpu.test_engine import gpu_engine
from tests.integration.engines import gaps, greedy, samples, scheduler
from tests.integration.heads import save_head
from tests.integration.simulation import ngram

pytestmark = pytest.mark.gpu

# 16 bits: codes of 8 turn a rounding into a step of theirs, which flips more than near ties.
OPTIONS = {"ratio": 8, "page_dtype": "auto", "min_prompt_tokens": 64, "interval": 2, "recent": 16,
           "max_ratio": 32}  # fmt: skip
PROMPTS = [
    prompt
    for task, length in [("single", 150), ("kv40", 500), ("copy", 700), ("multikey", 330),
                         ("qa", 90)]
    for prompt, _ in samples(task, length, 1)
]  # fmt: skip
LENGTH, DRAFTS = 100, 4


NEAR_TIE = 0.2
"""Logits are in bf16, a sixteenth apart; rows of several tokens take other tiles, which round
differently."""


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "method, runner, asynchronous",
    [
        ("ngram", "0", False),
        ("eagle", "0", False),
        ("eagle", "0", True),
        ("eagle", "1", True),
        ("eagle3", "1", True),
        ("eagle", "1", False),
    ],
)
def test_answers_are_the_same(
    method: str,
    runner: str,
    asynchronous: bool,
    eager: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    # Runner V1 ends with this off, and V2, whose rows come later in the same process, leaves it.
    monkeypatch.setattr("vllm.compilation.monitor.cudagraph_capturing_enabled", True)
    head: dict[str, Any] = ngram(DRAFTS)
    if method != "ngram":
        head = {"method": method, "model": save_head(tmp_path, method),
                "num_speculative_tokens": DRAFTS}  # fmt: skip
    settings: dict[str, Any] = {"enforce_eager": eager, "max_model_len": 2048}
    whole = {"extra_args": {"kv_compress_ratio": 1}}
    with gpu_engine(
        OPTIONS,
        **settings,
        speculative_config=head,
        async_scheduling=asynchronous,
        disable_log_stats=False,
    ) as llm:
        found = greedy(llm, PROMPTS, LENGTH, ignore_eos=True)
        again = greedy(llm, PROMPTS, LENGTH, ignore_eos=True)  # prefix hits
        exact = greedy(llm, PROMPTS, LENGTH, ignore_eos=True, **whole)
        counted = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
        assert scheduler(llm).kv_compress_manager.packed == {}
    assert counted["vllm:spec_decode_num_drafts"] > 0
    with gpu_engine(OPTIONS, **settings) as llm:
        for answers, asked in ((found, {}), (again, {}), (exact, whole)):
            apart = gaps(llm, PROMPTS, answers, ignore_eos=True, **asked)
            print(f"{method}, runner {runner}: the same up to (token, gap) {apart} of {LENGTH}")
            assert max(gap for _, gap in apart) < NEAR_TIE
        # What else is kept is no near tie.
        fewer = {"extra_args": {"kv_compress_ratio": 16}}
        other = greedy(llm, PROMPTS, LENGTH, ignore_eos=True, **fewer)
        assert max(gap for _, gap in gaps(llm, PROMPTS, other, ignore_eos=True)) > NEAR_TIE
