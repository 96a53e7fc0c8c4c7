# SPDX-License-Identifier: Apache-2.0
"""Whatever a request or a command line asks for: what it gets, or an error that helps."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from kvcompress_vllm.config.options import OPTIONS, KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.frontend.requests import KEYS, check_request, request_wish
from kvcompress_vllm.integration.start.flags import user_options
from kvcompress_vllm.records.budget import Wish
from tests.fuzzing import SCALARS, SPECS, TEXT_VALUES, fuzz, names_what_is_wrong
from tests.integration.simulation import MODEL

CONFIGS = [
    KVCompressConfig(),
    KVCompressConfig(allow_policies=True, min_ratio=2, ratio=4, max_ratio=8),
    KVCompressConfig(budget_tokens=64, max_ratio=2),
]
RANGES = st.lists(
    st.tuples(st.integers(-1, 10**10), st.integers(0, 300)).map(lambda r: f"{r[0]}:{sum(r)}")
    | st.text("0123456789:٣² -", max_size=9)
).map(",".join)
ASKED = st.dictionaries(
    st.sampled_from([*KEYS, "kv_compress_", "kv_compress_ratios", "other"]),
    SCALARS | RANGES | st.lists(SCALARS | RANGES, max_size=3),
    max_size=3,
)


@fuzz
@given(ASKED, st.sampled_from(CONFIGS), st.integers(1, 100_000))
@example({"kv_compress_ratio": 10**400}, CONFIGS[0], 100)
@example({"kv_compress_budget_tokens": 2**63}, CONFIGS[0], 100)
def test_requests(asked: dict[str, Any], config: KVCompressConfig, num_tokens: int) -> None:
    params = SamplingParams(extra_args=dict(asked))
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
