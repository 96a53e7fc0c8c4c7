# SPDX-License-Identifier: Apache-2.0
"""Policies through the engine: flags, and the keys that a real prompt keeps."""

from typing import Any

import pytest

from kvcompress_vllm.config.options import KVCompressConfig
from tests.integration.engines import engine, greedy, samples
from tests.integration.test_cli import resolved
from tests.policies import prompts
from tests.policies.test_parity import assert_same_choice, expected


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "cake", "policy_options": {"gamma": 50}},
        {"policy": "adakv", "window": 16},
        {"policy": "expected_attention", "allocator": "global"},
        {"policy": "diverse"},
    ],
    ids=lambda options: options["policy"],
)
def test_the_engine_keeps_what_the_paper_keeps(options: dict[str, Any]) -> None:
    """Prefill in two chunks; the reference has attention from ``transformers``."""
    ((prompt, _),) = samples("single", 400, 1)
    config = KVCompressConfig.from_dict({**options, "ratio": 4})
    with engine({**options, "ratio": 4}, max_num_batched_tokens=256) as llm:
        llm.collective_rpc("kv_compress_record")
        greedy(llm, [prompt], 3)
        (record,) = llm.collective_rpc("kv_compress_record")
    (kept,) = record.values()
    assert_same_choice(kept, *expected(config, prompts.real_prompt("single", 400)))


def test_flags() -> None:
    given = resolved("--kv-compress", "policy=cake,policy_options.gamma=50",
                     "--kv-compress-policy-options", "tau1=1.6,tau2=4e-1")  # fmt: skip
    assert given is not None and (given["policy"], given["window"]) == ("cake", 32)
    assert given["policy_options"] == {"gamma": 50, "tau1": 1.6, "tau2": 0.4}
    given = resolved("--kv-compress-policy-options", "alpha=0.5", "--kv-compress-policy", "adakv")
    assert given is not None and given["policy_options"] == {"alpha": 0.5}


def test_bad_policy_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("policy=cake,policy_options.speed=9", "policy=knorm,policy_options.speed=9"):
        with pytest.raises(SystemExit):
            resolved("--kv-compress", flag)
        assert "unknown policy_options.speed" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(SystemExit):
        resolved("--kv-compress", "policy_options.speed=9")
    assert "unknown policy_options key 'speed'" in capsys.readouterr().err.replace("\n", " ")
