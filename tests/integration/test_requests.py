# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, and what it is told otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.frontend.requests import (
    RESOLVED,
    check_request,
    received_budget,
    request_wish,
    send_budget,
)
from kvcompress_vllm.records.budget import KEEP_ALL, Wish


def ask(**extra_args: Any) -> Wish | None:
    return request_wish(SamplingParams(extra_args=extra_args))


def test_accepted() -> None:
    assert request_wish(None) is None and request_wish(SamplingParams()) is None
    assert ask(other_plugin=3) is None
    assert ask(kv_compress=True) is None and ask(kv_compress=1) is None
    assert ask(kv_compress=False) == ask(kv_compress=0) == KEEP_ALL
    assert ask(kv_compress_ratio=8) == Wish(ratio=8.0)
    assert ask(kv_compress=1, kv_compress_ratio=2.5) == Wish(ratio=2.5)
    assert ask(kv_compress_budget_tokens=512) == Wish(budget_tokens=512)
    assert ask(kv_compress_mass=0.95) == Wish(mass=0.95)
    assert ask(kv_compress_policy="cake", kv_compress_ratio=3) == Wish(ratio=3.0, policy="cake")


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"kv_compress": "no"}, "kv_compress='no' is not accepted; it must be true or false"),
        ({"kv_compress_ratio": 0.5}, "kv_compress_ratio=0.5 is not accepted; .* number >= 1"),
        ({"kv_compress_ratio": "8"}, "kv_compress_ratio='8' is not accepted"),
        ({"kv_compress_ratio": float("nan")}, "kv_compress_ratio=nan is not accepted"),
        ({"kv_compress_budget_tokens": 0}, "kv_compress_budget_tokens=0 .* integer >= 1"),
        ({"kv_compress_mass": 1.5}, "kv_compress_mass=1.5 .* number > 0 and <= 1"),
        ({"kv_compress_mass": 0.5, "kv_compress_ratio": 2}, "ratio=2 and .*mass=0.5 exclude each"),
        ({"kv_compress_mass": 0.5, "kv_compress_budget_tokens": 9}, "exclude each other"),
        ({"kv_compress_window": 3}, "unknown kv_compress_window=3; the keys are kv_compress, "),
        ({"kv_compress_ratio": 2, "kv_compress_budget_tokens": 5}, "exclude each other"),
        ({"kv_compress": 0, "kv_compress_ratio": 2}, "kv_compress_ratio=2 needs kv_compress=true"),
    ],
)
def test_refused(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(**extra_args)


def test_resumable_sessions_are_refused() -> None:
    check_request(KVCompressConfig(), SamplingParams(), resumable=False)
    with pytest.raises(ValueError, match="resumable"):
        check_request(KVCompressConfig(), SamplingParams(), resumable=True)


def test_policies_are_the_operators_to_allow() -> None:
    asked = SamplingParams(extra_args={"kv_compress_policy": "snapkv"})
    with pytest.raises(ValueError, match=r"'snapkv' is not accepted; .*'diverse' only"):
        check_request(KVCompressConfig(), asked, resumable=False)
    check_request(KVCompressConfig(policy="snapkv"), asked, resumable=False)
    allowing = KVCompressConfig(allow_policies=True)
    check_request(allowing, asked, resumable=False)
    unknown = SamplingParams(extra_args={"kv_compress_policy": "nap"})
    with pytest.raises(ValueError, match=r"^kv_compress_policy='nap' is not accepted; .*snapkv"):
        check_request(allowing, unknown, resumable=False)


def test_a_mass_is_of_scores_that_add_up() -> None:
    def check(config: KVCompressConfig, **extra_args: Any) -> None:
        check_request(config, SamplingParams(extra_args=extra_args), resumable=False)

    allowing = KVCompressConfig(allow_policies=True)
    check(allowing, kv_compress_mass=0.9)  # by the attention of kv_compress
    check(allowing, kv_compress_mass=0.9, kv_compress_policy="cake")
    check(allowing, kv_compress_ratio=2, kv_compress_policy="roco")
    with pytest.raises(ValueError, match=r"kv_compress_mass=0\.9 needs .*those of 'diverse' do"):
        check(allowing, kv_compress_mass=0.9, kv_compress_policy="diverse")
    by_mass = KVCompressConfig(mass=0.8, allow_policies=True)
    check(by_mass, kv_compress_ratio=2, kv_compress_policy="roco")
    with pytest.raises(ValueError, match=r"mass=0\.8 needs .*those of 'roco' do"):
        check(by_mass, kv_compress_policy="roco")


def test_any_policy_of_a_server_takes_a_mass() -> None:
    """Of scores that add up, even where its own need options that others refuse."""
    config = KVCompressConfig.from_dict({"policy": "roco", "query_stride": 8})
    asked = SamplingParams(extra_args={"kv_compress_mass": 0.9})
    budget = check_request(config, asked, resumable=False)
    assert (budget.policy, budget.query_stride, budget.mass) == ("kv_compress", 0, 0.9)
    own = check_request(config, SamplingParams(), resumable=False)
    assert (own.policy, own.query_stride) == ("roco", 8)
    whole = SamplingParams(extra_args={"kv_compress_mass": 1})
    assert check_request(config, whole, resumable=False).packed_blocks(1600, 16) == 100


def test_the_budget_travels_to_the_engine() -> None:
    config = KVCompressConfig.from_dict({"allow_policies": True})
    asked = {"kv_compress_ratio": 3, "kv_compress_protect": "0:9,20:30", "other": 7}
    params = SamplingParams(extra_args=asked)
    budget = check_request(config, params, resumable=False)
    send_budget(config, params)
    assert asked["other"] == 7 and "kv_compress_ratio" in asked, "the client's own"
    assert params.extra_args is not None and params.extra_args.keys() == {"other", RESOLVED}
    sent = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    assert received_budget(config, sent) == budget and budget.protect == ((0, 9), (20, 30))
    nothing = SamplingParams(extra_args={"other": 7})
    send_budget(config, nothing)
    assert nothing.extra_args == {"other": 7} and received_budget(config, nothing) is None
    with pytest.raises(ValueError, match="unknown kv_compress_resolved"):
        check_request(config, params, resumable=False)
