# SPDX-License-Identifier: Apache-2.0
"""A policy that fails while the engine runs ends its request, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from tests.integration.engines import engine, samples, scheduler
from tests.policies.installed import install

NAMES = {"late": "LateRaises", "infinite": "LateNotFinite", "huge": "Huge", "raises": "Raises"}


def choosing(policy: str | None, **options: Any) -> SamplingParams:
    extra = {"kv_compress_policy": policy} if policy else {}
    return SamplingParams(temperature=0, max_tokens=12, extra_args={**extra, **options})


def test_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **{name: f"tests.policies.faulty:{cls}" for name, cls in NAMES.items()})
    monkeypatch.setenv("KVCOMPRESS_CHECK_INTEGRITY", "1")
    ((prompt, _),) = samples("single", 500, 1)
    params = [
        choosing(None),
        choosing("late"),
        choosing("snapkv"),
        choosing("infinite"),
        choosing("huge", kv_compress_mass=0.5),
        choosing("late", kv_compress_mass=0.5),
    ]
    with engine({"ratio": 4, "allow_policies": True}) as llm:
        alone = [llm.generate([prompt], params[i], use_tqdm=False)[0].outputs[0] for i in (0, 2)]
        outputs = [
            output.outputs[0]
            for output in llm.generate([prompt] * len(params), params, use_tqdm=False)
        ]
        again = llm.generate([prompt], params[0], use_tqdm=False)[0].outputs[0]
        pool = scheduler(llm).kv_compress_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        with pytest.raises(ValueError, match="kv_compress_policy='raises' is not accepted"):
            llm.generate([prompt], choosing("raises"), use_tqdm=False)
    reasons = [output.finish_reason for output in outputs]
    assert [reason == "error" for reason in reasons] == [False, True, False, True, False, True]
    assert outputs[1].stop_reason == "kv_compress: score raised KeyError: 'no such channel'"
    assert "not finite" in outputs[3].stop_reason
    assert outputs[0].token_ids == alone[0].token_ids == again.token_ids
    assert outputs[2].token_ids == alone[1].token_ids
