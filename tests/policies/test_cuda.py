# SPDX-License-Identifier: Apache-2.0
"""On CUDA every policy keeps what it keeps on the CPU, and waits for nothing on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvcompress_vllm import ops, policies
from kvcompress_vllm.compression import allocation, loss
from kvcompress_vllm.config.options import KVCompressConfig
from tests.policies import prompts
from tests.policies.test_parity import CASES, assert_same_choice, case_id, expected

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available() or not all(ops.backends()["CUDA"].values()):
        pytest.skip("no CUDA device, or no CUDA kernels")


def without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_same_keys_without_waiting(case, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policies.find(case["policy"])
    monkeypatch.setattr(policy, "score", without_waiting(policy.score))
    for module, name in [
        (allocation, "freed_pages"), (loss, "page_masses"), (loss, "loss_at"),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, without_waiting(getattr(module, name)))
    config = KVCompressConfig.from_dict({**case, "ratio": 2.5})
    pair = [prompts.random_prompt(213, 0), prompts.random_prompt(335, 2)]
    for a, kept in zip(pair, prompts.compress(config, pair, "cuda"), strict=True):
        assert_same_choice(kept, *expected(config, a))
