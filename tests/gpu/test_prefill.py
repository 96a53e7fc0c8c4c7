# SPDX-License-Identifier: Apache-2.0
"""Packed prefill rows on a GPU: our kernel beside FlashAttention in one batch."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.gpu.test_engine import PAIRS, PROMPTS, gpu_engine, right
from tests.integration.engines import greedy
from tests.integration.hidden import answered

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("page_dtype, bits", [("auto", 16), ("fp8", 8)])
def test_questions_after_the_compression(
    page_dtype: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios count bits, too: the same keys are kept."""
    times = 16 // bits
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {"ratio": 8 * times, "allow_policies": True, "window": 64, "query_stride": 8,
               "page_dtype": page_dtype}  # fmt: skip
    with gpu_engine(options) as llm:
        assert answered(llm, PAIRS, kv_compress_policy="kv_compress") <= 8
        assert answered(llm, PAIRS, kv_compress_policy="keydiff", kv_compress_ratio=3 * times) >= 14
        assert answered(llm, PAIRS, protect=True) >= 17
        assert answered(llm, PAIRS, protect=True, kv_compress_policy="h2o") >= 14


def test_prompts_larger_than_their_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    options = {"ratio": 2, "prefill_peak_tokens": 1024, "policy": "diverse"}
    with gpu_engine(options, num_gpu_blocks_override=300) as llm:
        outputs = greedy(llm, PROMPTS, 16)
        assert right(llm, outputs) >= 10
