# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, and what it is told otherwise."""

from __future__ import annotations

import inspect
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.frontend import checks, contexts, requests, wish
from kvcompress_vllm.integration.frontend.body import check_body
from kvcompress_vllm.integration.frontend.checks import BadRequestError, bad_request
from kvcompress_vllm.integration.frontend.requests import (
    RESOLVED,
    check_request,
    received_budget,
    send_budget,
)
from kvcompress_vllm.integration.frontend.wish import KEYS, request_wish
from kvcompress_vllm.records.budget import KEEP_ALL, Wish
from tests.integration.simulation import MODEL


def ask(**extra_args: Any) -> Wish | None:
    return request_wish(SamplingParams(extra_args=extra_args))


def test_accepted() -> None:
    assert request_wish(None) is None and request_wish(SamplingParams()) is None
    assert ask(other_plugin=3) is None
    assert ask(kv_compress=True) is None and ask(kv_compress=1) is None
    assert ask(kv_compress=None, kv_compress_ratio=None, kv_compress_mass=None) is None
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
        (  # vLLM 0.33 refuses integers of more than 64 bits itself
            {"kv_compress_context_stride": 2**63},
            r"context_stride=\d+ \(too large\) is not accepted",
        ),
        ({"kv_compress_context_stride": 2**31}, r"stride=2147483648 \(too large\) .* of 256"),
        ({"kv_compress_context_tokens": 2**63}, r"context_tokens=\d+ \(too large\) is not acc"),
        ({"kv_compress_budget_tokens": 0}, "kv_compress_budget_tokens=0 .* integer >= 1"),
        ({"kv_compress_mass": 1.5}, "kv_compress_mass=1.5 .* number > 0 and <= 1"),
        ({"kv_compress_mass": 0.5, "kv_compress_ratio": 2}, "ratio=2 and .*mass=0.5 exclude each"),
        ({"kv_compress_mass": 0.5, "kv_compress_budget_tokens": 9}, "exclude each other"),
        ({"kv_compress_window": 3}, r"unknown kv_compress_window=3; .*The keys are kv_compress, "),
        ({"kv_compress_ratio": 2, "kv_compress_budget_tokens": 5}, "exclude each other"),
        ({"kv_compress": 0, "kv_compress_ratio": 2}, "kv_compress_ratio=2 needs kv_compress=true"),
        ({"kv_compress_ratio": True}, "kv_compress_ratio=True is not accepted"),
        ({"kvcompress_ratio": 2}, r"unknown kvcompress_ratio=2; did you mean kv_compress_ratio\?"),
        ({"KV-Compress-Ratio": 2}, r"did you mean kv_compress_ratio\?"),
        ({"kv_comress_ratio": 2}, r"did you mean kv_compress_ratio\?"),
        ({"kvCompress": False}, r"did you mean kv_compress\?"),
        ({"ratio": 2}, r"unknown ratio=2; did you mean kv_compress_ratio\?"),
        ({"context_tokens": 200}, r"did you mean kv_compress_context_tokens\?"),
        ({"kv_compress_\n\x1b[31m": 1}, r"unknown kv_compress_\\n\\x1b\[31m=1;"),
    ],
)
def test_refused(extra_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(**extra_args)


@pytest.mark.parametrize(
    "value",
    ["0:1," * 1_000_000, ["0:1"] * 1_000_000, ["0:1," * 1_000_000], [["0:1"] * 10**6], "x" * 10**7,
     {str(key): key for key in range(10**5)}],
    ids=["string", "list", "long item", "nested", "no range", "object"],
)  # fmt: skip
@pytest.mark.parametrize("key", ["kv_compress_protect", "kv_compress_ratio", "kv_compress"])
def test_what_is_large_is_refused_unread(
    key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 MB of ranges once took the event loop seven seconds."""

    def read(*_: object) -> None:
        raise AssertionError("read although large")

    nested = isinstance(value, dict) or isinstance(value[0], list)
    if not nested:
        monkeypatch.setattr(wish.re, "fullmatch", read)
    for wrong in ({key: value}, {key: value, "kv_compress_mass": 0.5}):
        with pytest.raises(ValueError, match=f"^{key}=.* (is not accepted|exclude)") as refused:
            ask(**wrong)
        assert len(str(refused.value)) < 400
    with pytest.raises(ValueError, match="unknown kv_compress_x") as refused:
        ask(**{"kv_compress_x" * 10**6: value})
    assert len(str(refused.value)) < 600


def test_all_values_together_are_bounded() -> None:
    ranges = ",".join(f"{start}:{start + 1}" for start in range(0, 128, 2))
    assert len(ask(kv_compress_protect=ranges).protect) == 64
    with pytest.raises(ValueError, match=r"kv_compress_protect=.* must be at most 64 ranges"):
        ask(kv_compress_protect=f"{ranges},200:201")
    with pytest.raises(ValueError, match=r"kv_compress_protect=.* 4096 characters together"):
        ask(kv_compress_policy="x" * 4000, kv_compress_protect=ranges)


def test_other_keys_are_not_ours() -> None:
    others = {"kv_transfer_params": {"do_remote_prefill": True}, "ec_transfer_params": {},
              "compression_ratio_threshold": 2.4, "target_token": 3, "kv": 1}  # fmt: skip
    assert ask(**others) is None
    assert ask(**{f"kv_{number}": number for number in range(10**5)}) is None


def body_error(**body: Any) -> str:
    try:
        check_body({"model": "m", "prompt": "p", **body})
    except ValueError as error:
        return str(error)
    return ""


def test_bodies() -> None:
    """What vLLM drops, or changes before we see it."""
    assert body_error() == body_error(vllm_xargs=None) == body_error(vllm_xargs=[1]) == ""
    assert body_error(vllm_xargs={"kv_compress": False}) == ""
    assert body_error(vllm_xargs={"kv_compress": True, "kv_compress_ratio": 2}) == ""
    for key in KEYS[1:]:
        message = body_error(vllm_xargs={key: True})
        assert re.match(f"{key}=True is not accepted; it must be .", message), message
    for field in ("kv_compress", "kv_compress_ratio"):
        assert body_error(**{field: 1}) == (
            f"{field} in the body is not accepted; it must be in vllm_xargs"
        )
        inner = {"vllm_xargs": {field: 1}}
        assert f"{field} in extra_body.vllm_xargs" in body_error(extra_body=inner)
        assert f"{field} in extra_args is not" in body_error(extra_args={field: 1})
        for wrong in (inner, {field: 1}, {"sampling_params": {field: 1}}):
            tokens_in = body_error(token_ids=[1], **wrong)
            assert tokens_in.endswith("it must be in sampling_params.extra_args")
    assert "did you mean kv_compress_ratio?" in body_error(kvcompress_ratio=1)
    beams = {"use_beam_search": True}
    assert "kv_compress_ratio is not" in body_error(vllm_xargs={"kv_compress_ratio": 2}, **beams)
    assert body_error(vllm_xargs={"kv_compress": False}, **beams) == ""


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, None),
        ({"share": "auto"}, "share=auto"),
        ({"context_stride": 512}, "context_stride=512"),
        ({"prefill_peak_tokens": 1024}, "prefill_peak_tokens=1024"),
    ],
)
def test_beams_that_would_be_compressed_all_the_same(options, named) -> None:
    """vLLM makes their requests without what ours asked for."""
    body = {"use_beam_search": True, "vllm_xargs": {"kv_compress": False}}
    config = KVCompressConfig.from_dict(options)
    if named is None:
        check_body(body, config)
    else:
        with pytest.raises(ValueError, match=f"use_beam_search by a server with {named}, which"):
            check_body(body, config)
    check_body({**body, "vllm_xargs": {"kv_compress": True}}, config)
    check_body({**body, "use_beam_search": False}, config)


@pytest.mark.parametrize("path", ["/generative_scoring", "/cohere/v2/chat"])
def test_routes_that_drop_what_is_asked(path) -> None:
    for asked in ({"kv_compress": False}, {"kv_compress_ratio": 4}):
        with pytest.raises(ValueError, match=f"is not accepted by {path}, where vLLM drops"):
            check_body({"vllm_xargs": asked}, None, path)
        check_body({"vllm_xargs": asked}, None, "/v1/completions")
    check_body({"vllm_xargs": {"other": 1}}, None, path)


def test_what_is_repeated_is_text() -> None:
    """Of a chat with parts that are embeddings vLLM has token ids for these, too."""
    assert requests.has_embeddings(SimpleNamespace(prompt_token_ids=[1, 1], prompt_embeds=[[0.5]]))
    assert requests.has_embeddings(SimpleNamespace(prompt_token_ids=None, prompt_embeds=[[0.5]]))
    assert not requests.has_embeddings(SimpleNamespace(prompt_token_ids=[1], prompt_embeds=None))


def test_a_context_is_within_the_prompt() -> None:
    def error(context: int, ids: Any, embeds: Any = None) -> str:
        params = SamplingParams(extra_args={"kv_compress_context_tokens": context})
        request = SimpleNamespace(
            sampling_params=params, prompt_token_ids=ids, prompt_embeds=embeds
        )
        try:
            requests.check_context(KVCompressConfig(), request)
        except ValueError as refused:
            return str(refused)
        return ""

    assert error(128, [1] * 128) == error(200, None, torch.zeros(200, 8)) == ""
    assert ">= 128 (min_prompt_tokens) and <= 300, the tokens" in error(127, [1] * 300)
    assert "kv_compress_context_tokens=301 is not accepted" in error(301, [1] * 300)
    assert "301 is not accepted" in error(301, None, torch.zeros(300, 8))
    assert "the prompt has 50 tokens" in error(20, [1] * 50)


def test_only_what_is_read_as_a_token_must_be_one() -> None:
    """Where an image or an embedding stands, ids may be placeholders."""
    ids = [7, 8, -1, -2]
    for more in ({"mm_features": ["image"]}, {"prompt_is_token_ids": [True, True, False, False]}):
        requests.check_token_ids(SimpleNamespace(prompt_token_ids=ids, **more))
    for more in ({"mm_features": None}, {"prompt_is_token_ids": [True, False, True, False]}):
        with pytest.raises(ValueError, match="token id -1 is not accepted, the prompt's number 2;"):
            requests.check_token_ids(SimpleNamespace(prompt_token_ids=ids, **more))
    requests.check_token_ids(SimpleNamespace(prompt_token_ids=None))


def test_errors_are_bad_requests_to_every_vllm() -> None:
    """vLLM 0.27 and later answer HTTP 500 where ``process_inputs`` raises a plain ValueError."""
    told = pytest.raises(VLLMValidationError, match=r"^kv_compress_ratio=0 is not")
    with told as refused, bad_request():
        ask(kv_compress_ratio=0)
    assert isinstance(refused.value, ValueError)


def test_generate_checks_when_it_is_called() -> None:
    """Not when its first token is asked for: a stream has been HTTP 200 for long then."""
    vllm_config = EngineArgs(
        str(MODEL), additional_config={"kv_compress": True}, max_model_len=2048
    ).create_engine_config()
    engine = SimpleNamespace(vllm_config=vllm_config)
    prompt = {"type": "token", "prompt_token_ids": [1] * 300}

    def generate(**extra_args: Any) -> Any:
        params = SamplingParams(max_tokens=4, extra_args=extra_args)
        return AsyncLLM.generate(engine, prompt, params, "r")

    assert inspect.isasyncgen(generate(kv_compress_ratio=2, kv_compress_context_tokens=300))
    for wrong in ({"kv_compress_ratio": 0}, {"kv_compress_context_tokens": 301}):
        with pytest.raises(BadRequestError, match="is not accepted"):
            generate(**wrong)


def test_the_rust_front_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = EngineArgs(str(MODEL), additional_config={"kv_compress": True})
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match=r"VLLM_USE_RUST_FRONTEND=1 is not .*; unset it"):
        args.create_engine_config()


def test_resumable_sessions_are_refused() -> None:
    check_request(KVCompressConfig(), SamplingParams(), resumable=False)
    with pytest.raises(ValueError, match="resumable"):
        check_request(KVCompressConfig(), SamplingParams(), resumable=True)


def test_policies_are_the_operators_to_allow() -> None:
    asked = SamplingParams(extra_args={"kv_compress_policy": "snapkv"})
    with pytest.raises(ValueError, match=r"'snapkv' is not accepted; .*'echo' only"):
        check_request(KVCompressConfig(), asked, resumable=False)
    check_request(KVCompressConfig(policy="snapkv"), asked, resumable=False)
    allowing = KVCompressConfig(allow_policies=True)
    check_request(allowing, asked, resumable=False)
    unknown = SamplingParams(extra_args={"kv_compress_policy": "nap"})
    with pytest.raises(ValueError, match=r"^kv_compress_policy='nap' is not accepted; .*snapkv"):
        check_request(allowing, unknown, resumable=False)
    empty = SamplingParams(extra_args={"kv_compress_policy": ""})
    for config in (allowing, KVCompressConfig(), KVCompressConfig(mass=0.9)):
        with pytest.raises(ValueError, match=r"^kv_compress_policy='' is not accepted; "):
            check_request(config, empty, resumable=False)


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
    send_budget(budget, params)
    assert asked["other"] == 7 and "kv_compress_ratio" in asked, "the client's own"
    assert params.extra_args is not None and params.extra_args.keys() == {"other", RESOLVED}
    sent = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    assert received_budget(config, sent) == budget and budget.protect == ((0, 9), (20, 30))
    nothing = SamplingParams(extra_args={"other": 7})
    send_budget(budget, nothing)
    assert nothing.extra_args == {"other": 7} and received_budget(config, nothing) is None
    with pytest.raises(ValueError, match="unknown kv_compress_resolved"):
        check_request(config, params, resumable=False)


def test_a_stride_where_nobody_can_share_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "unshared", lambda config: "its layers have a window")
    params = SamplingParams(extra_args={"kv_compress_context_stride": 256})
    budget = check_request(KVCompressConfig(), params, resumable=False)
    message = (
        "kv_compress_context_stride=256 is not accepted: its layers have a window; leave it out"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        requests.check_sharing(SimpleNamespace(), SimpleNamespace(), budget)
    monkeypatch.setattr(requests, "unshared", lambda config: None)
    requests.check_sharing(SimpleNamespace(), SimpleNamespace(), budget)


def test_images_are_seen_before_the_response_begins(monkeypatch) -> None:
    """What is refused of a prompt with images is refused at the call, as of every other."""
    seen: list[Any] = []
    monkeypatch.setattr(checks, "resolved_config", lambda config: KVCompressConfig())
    for name in ("check_request", "check_length", "check_context"):
        monkeypatch.setattr(requests, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(
        requests, "check_sharing", lambda config, request, budget: seen.append(request)
    )
    for images in (None, {"image": [object()]}):
        prompt = {"prompt_token_ids": [1], **({"mm_kwargs": images} if images else {})}
        checks.check(None, prompt, SamplingParams())
    assert [bool(request.mm_features) for request in seen] == [False, True]


def test_a_context_goes_to_the_engines_of_this_server() -> None:
    def engines(size: int, local: int, only: bool) -> int:
        return contexts._engines(
            SimpleNamespace(
                data_parallel_size=size, data_parallel_size_local=local, local_engines_only=only
            )
        )

    assert engines(1, 1, False) == 1 and engines(4, 2, False) == 4
    assert engines(4, 1, True) == 1 and engines(4, 2, True) == 2


def test_a_mass_and_a_context_on_several_stages(monkeypatch) -> None:
    """The request would compute nothing until it hears how much it keeps, and a stage tells the
    last of that with tokens alone."""
    monkeypatch.setattr(requests, "unshared", lambda config: None)
    prompt = SimpleNamespace(prompt_token_ids=[1] * 400)

    def error(stages: int, **wish: Any) -> str:
        config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=stages))
        budget = resolve(KVCompressConfig(), Wish(**wish))
        try:
            requests.check_sharing(config, prompt, budget)
        except ValueError as refused:
            return str(refused)
        return ""

    assert error(1, mass=0.9, context_tokens=256) == error(2, mass=0.9) == ""
    assert error(2, ratio=4.0, context_tokens=256) == ""
    assert error(2, mass=0.9, context_tokens=256) == (
        "kv_compress_context_tokens=256 is not accepted with a mass on several pipeline stages; "
        "leave it out, or give a ratio"
    )
