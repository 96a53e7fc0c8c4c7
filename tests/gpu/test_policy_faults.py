# SPDX-License-Identifier: Apache-2.0
"""A policy that fails on a GPU, or on one of two: graphs, async scheduling, reports of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.gpu.test_engine import PROMPTS, gpu_engine
from tests.integration.test_policy_faults import choosing
from tests.policies.installed import install_for_all

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_others_go_on(ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    classes = {"late": "LateRaises", "infinite": "LateNotFinite"}
    if ranks > 1:
        classes["elsewhere"] = "LateRaisesOnRank1"
    install_for_all(
        tmp_path,
        monkeypatch,
        **{name: f"tests.policies.faulty:{cls}" for name, cls in classes.items()},
    )
    names = [None, *classes, "snapkv"]
    prompts = PROMPTS[:1] * len(names)
    params = [choosing(name) for name in names]
    options = {"ratio": 4, "allow_policies": True}
    with gpu_engine(options, tensor_parallel_size=ranks) as llm:
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        again = llm.generate(prompts[:1], params[0], use_tqdm=False)[0].outputs[0]
    failed = [output.finish_reason == "error" for output in outputs]
    assert failed == [name in classes for name in names]
    assert outputs[0].token_ids == again.token_ids
