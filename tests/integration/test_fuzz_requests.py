# SPDX-License-Identifier: Apache-2.0
"""Whatever a request or a command line asks for: what it gets, or an error that helps."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.frontend.requests import check_request
from kvcompress_vllm.integration.frontend.wish import KEYS, request_wish
from kvcompress_vllm.integration.start.flags import user_options
from kvcompress_vllm.policies import BUILT_IN
from kvcompress_vllm.records.budget import Wish
from tests.fuzzing import EXAMPLES, SCALARS, SPECS, TEXT_VALUES, fuzz, names_what_is_wrong
from tests.integration.simulation import MODEL
from tests.integration.test_server import Server, serve

CONFIGS = [
    KVCompressConfig(),
    KVCompressConfig(allow_policies=True, min_ratio=2, ratio=4, max_ratio=8),
    KVCompressConfig(budget_tokens=64, max_ratio=2),
]
RANGES = st.lists(
    st.tuples(st.integers(-1, 10**10), st.integers(0, 300)).map(lambda r: f"{r[0]}:{sum(r)}")
    | st.text("0123456789:٣² -", max_size=9)
).map(",".join)
TOO_LARGE = "extra_args integers must be"
"""What newer vLLM says of integers that do not reach its engine."""
ASKED = st.dictionaries(
    st.sampled_from([*KEYS, "kv_compress_", "kv_compress_ratios", "other"]),
    SCALARS | RANGES | st.lists(SCALARS | RANGES, max_size=3),
    max_size=3,
)


@fuzz
@given(ASKED, st.sampled_from(CONFIGS), st.integers(1, 100_000))
@example({"kv_compress_ratio": 10**400}, CONFIGS[0], 100)
@example({"kv_compress_budget_tokens": 2**63}, CONFIGS[0], 100)
@example({"kv_compress_context_stride": 2**64}, CONFIGS[0], 100)
@example({"kv_compress_context_stride": 10**30}, CONFIGS[1], 100)
def test_requests(asked: dict[str, Any], config: KVCompressConfig, num_tokens: int) -> None:
    try:
        params = SamplingParams(extra_args=dict(asked))
    except Exception as error:
        assert str(error).startswith(TOO_LARGE), error
        return
    try:
        check_request(config, params, resumable=False)
    except ValueError as error:
        assert names_what_is_wrong(str(error)) and len(str(error)) < 1000, error
        return
    # What passes the front end must reach the engine core and be understood there.
    own = {key: value for key, value in asked.items() if key in KEYS}
    frames = MsgpackEncoder().encode(SamplingParams(extra_args=own))
    wish = request_wish(MsgpackDecoder(SamplingParams).decode(frames))
    assert wish == request_wish(params) and (wish is None or isinstance(wish, Wish))
    covered = num_tokens // 16
    kept = resolve(config, wish).packed_blocks(num_tokens, 16)
    assert (kept >= 1 or covered == 0) and kept <= covered


@pytest.fixture(scope="module")
def parser() -> Any:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


FLAGS = st.lists(
    st.tuples(st.just("--kv-compress"), SPECS)
    | st.tuples(
        st.sampled_from([f"--kv-compress-{name.replace('_', '-')}" for name in OPTIONS]),
        TEXT_VALUES,
    ),
    min_size=1,
    max_size=3,
)


@fuzz
@given(flags=FLAGS)
@example(flags=[("--kv-compress-ratio", "9" * 400)])
@example(flags=[("--kv-compress-policy-options", "norm=L1"), ("--kv-compress-policy", "cake")])
def test_command_lines(parser: Any, capsys: Any, flags: list[tuple[str, str]]) -> None:
    given = [f"{flag}={value}" for flag, value in flags]
    try:
        namespace = parser.parse_args(["--model", str(MODEL), *given])
    except SystemExit as end:
        message = capsys.readouterr().err
        assert end.code == 2 and names_what_is_wrong(message.replace("\n", " ")), message
        return
    args = AsyncEngineArgs.from_cli_args(namespace)
    try:
        config = user_options(args.additional_config)
    except ValueError as error:  # what only the whole shows, like options of the default policy
        assert names_what_is_wrong(str(error)), error
        return
    assert config is not None


EVERYTHING = (
    "mass=0.9,policy=kv_compress,prefill_peak_tokens=256,allow_policies=true,query_stride=8,"
    "min_prompt_tokens=48,interval=2,max_ratio=16"
)
SENSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "kv_compress": st.just(True),
        "kv_compress_policy": st.sampled_from(list(BUILT_IN)),
        "kv_compress_context_tokens": st.integers(40, 480),
        "kv_compress_protect": st.tuples(st.integers(0, 400), st.integers(1, 300)).map(
            lambda r: f"{r[0]}:{sum(r)}"
        ),
    },
)
BUDGETS = (
    st.just({})
    | st.fixed_dictionaries({"kv_compress_ratio": st.sampled_from([1, 1.5, 4, 16, 1000])})
    | st.fixed_dictionaries({"kv_compress_budget_tokens": st.sampled_from([1, 64, 300])})
    | st.fixed_dictionaries({"kv_compress_mass": st.sampled_from([0.01, 0.5, 0.95, 1])})
)
JSON = st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats(-9, 1e30) | RANGES
WILD = st.dictionaries(st.sampled_from([*KEYS, "kvcompress_mass"]), JSON | st.lists(JSON))
XARGS = (
    st.just({"kv_compress": False})
    | st.tuples(SENSIBLE, BUDGETS).map(lambda both: {**both[0], **both[1]})
    | WILD
)
BODIES = st.fixed_dictionaries(
    {
        "prompt": st.integers(1, 480).map(lambda length: [1500 + length] * length),
        "max_tokens": st.integers(1, 32),
        "n": st.sampled_from([1, 1, 2]),
        "stream": st.booleans(),
        "vllm_xargs": XARGS,
    }
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--kv-compress", EVERYTHING, "--max-model-len", "512", "--block-size", "16",
             "--num-gpu-blocks-override", "80", "--max-num-batched-tokens", "128",
             "--max-num-seqs", "8"]  # fmt: skip
    with serve(tmp_path_factory.mktemp("fuzz"), *flags) as running:
        yield running


def outcome(server: Server, body: dict[str, Any]) -> str:
    """Empty if a request was answered in full, or refused in order; else what went wrong."""
    more = {"model": "tiny", "ignore_eos": True, "temperature": 1}
    if body["stream"]:
        more["stream_options"] = {"include_usage": True}
    reply = httpx.post(f"{server.url}/v1/completions", json={**body, **more}, timeout=240)
    if reply.status_code == 400:
        message = reply.json()["error"]["message"]
        named = names_what_is_wrong(message) or any(
            reason in message
            for reason in ("vllm_xargs", "blocks of 16 tokens as this request", TOO_LARGE)
        )
        return "" if named and len(message) < 2000 else f"no help: {message[:500]}"
    if reply.status_code != 200:
        return f"HTTP {reply.status_code}: {reply.text[:500]}"
    if '"error"' in reply.text or body["stream"] != reply.text.endswith("data: [DONE]\n\n"):
        return f"broke off: {reply.text[-500:]}"
    told = re.findall(r'"completion_tokens":\s*(\d+)', reply.text)
    wanted = body["n"] * body["max_tokens"]
    return "" if told[-1:] == [str(wanted)] else f"{told} of {wanted} tokens"


@settings(fuzz, max_examples=max(1, EXAMPLES // 20), phases=[Phase.generate])
@given(bodies=st.lists(BODIES, min_size=6, max_size=8))
def test_requests_side_by_side(server: Server, bodies: list[dict[str, Any]]) -> None:
    """Through the real engine over HTTP, with every option on, in a pool that is too small."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        outcomes = list(pool.map(lambda body: outcome(server, body), bodies))
    wrong = [(text, {**body, "prompt": len(body["prompt"])})
             for text, body in zip(outcomes, bodies, strict=True) if text]  # fmt: skip
    assert not wrong, wrong
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_fuzzed_server_has_lost_nothing(server: Server) -> None:
    for _ in range(100):
        if server.used_blocks() == 0:
            break
        time.sleep(0.1)
    assert server.used_blocks() == 0
    assert server.ours()["compressions_total prefill"] > 5
    log = server.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]
