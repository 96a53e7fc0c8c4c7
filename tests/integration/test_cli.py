# SPDX-License-Identifier: Apache-2.0
"""Flags and engine arguments: what users type, what reaches vLLM, what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvcompress_vllm.config import presets
from kvcompress_vllm.config.options import OPTIONS
from kvcompress_vllm.config.spelling import default_text
from tests.integration.simulation import MODEL

DEFAULT = {"ratio": 2.0, "policy": "echo", "page_dtype": "fp8"}


def parse(*flags: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(MODEL), *flags]))


def resolved(*flags: str) -> dict[str, Any] | None:
    return parse(*flags).create_engine_config().additional_config.get("kv_compress")


def test_without_the_flag_nothing_changes() -> None:
    args = parse()
    config = args.create_engine_config()
    assert config.additional_config == {}
    assert (args.scheduler_cls, args.worker_cls, args.attention_backend) == (None, "auto", None)
    assert config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--kv-compress"], DEFAULT),
        (["--kv-compress", "ratio=8,window=16"], {"ratio": 8.0, "window": 16}),
        (["--kv-compress=ratio=2"], {"ratio": 2.0}),
        (["--kv-compress-ratio", "8"], {"ratio": 8.0}),
        (["--kv-compress", "ratio=2", "--kv-compress-ratio", "8", "--kv-compress-pool=3"],
         {"ratio": 8.0, "pool": 3}),
        (["--kv-compress", str(MODEL.parents[1] / "configs" / "ratio-8.yaml")], {"ratio": 8.0}),
        (["--kv-compress", "cake"], {"policy": "cake", "budget_tokens": 1024}),
        # A preset or file gives way to what is written out, before and after it.
        (["--kv-compress", str(MODEL.parents[1] / "configs" / "cake.yaml"),
          "--kv-compress-ratio", "3"], {"policy": "cake", "ratio": 3.0, "window": 32}),
        (["--kv-compress-ratio", "3", "--kv-compress", "cake"], {"policy": "cake", "ratio": 3.0}),
        (["--kv-compress", "cake,ratio=3"], {"policy": "cake", "ratio": 3.0}),
        (["--kv-compress", "cake", "--kv-compress-policy-options", "tau1=2"],
         {"policy_options": {"gamma": 200, "tau1": 2, "tau2": 1}}),
        (["--additional-config", '{"kv_compress": "cake"}', "--kv-compress-mass", "0.9"],
         {"policy": "cake", "mass": 0.9}),
        (["--kv-compress", '{"ratio": 8, "decode": false}'], {"ratio": 8.0, "decode": False}),
        (["--kv-compress.ratio", "8"], {"ratio": 8.0}),
        (["--kv-compress", "ratio=8", "--additional-config", '{"x": 1}'], {"ratio": 8.0}),
        (["--kv-compress", "ratio=8", "--additional-config.x", "1"], {"ratio": 8.0}),
        (["--additional-config", '{"kv_compress": {"ratio": 2, "sinks": 9}}'],
         {"ratio": 2.0, "sinks": 9}),
        (["--additional-config", '{"kv_compress": {"ratio": 2, "sinks": 9}}',
          "--kv-compress-budget-tokens", "256"], {"budget_tokens": 256, "sinks": 9}),
        (["--additional-config.kv_compress.ratio", "8"], {"ratio": 8.0}),
        (["--additional-config", '{"kv_compress": true}'], DEFAULT),
    ],
)  # fmt: skip
def test_spellings(flags: list[str], expected: dict[str, Any]) -> None:
    options = resolved(*flags)
    assert options is not None and expected.items() <= options.items()
    assert len({"ratio", "budget_tokens", "mass"} & options.keys()) == 1


@pytest.mark.parametrize("value", ["false", "null"])
def test_off_in_additional_config_is_off(value: str) -> None:
    args = parse("--additional-config", f'{{"kv_compress": {value}}}')
    assert args.create_engine_config().additional_config == {}
    assert args.scheduler_cls is None


def test_yaml_config_of_vllm(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("kv-compress: true\nkv-compress-ratio: 8\n")
    options = resolved("--config", str(path))
    assert options is not None and options["ratio"] == 8.0
    path.write_text("kv-compress:\n  ratio: 8\n  decode: false\n")
    options = resolved("--config", str(path))
    assert options is not None and (options["ratio"], options["decode"]) == (8.0, False)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-compress", "ration=8"], "unknown key 'ration'"),
        (["--kv-compress", "ratio=0"], "ratio=0 is not accepted; it must be a number >= 1"),
        (["--kv-compress-window", "none"], "window='none' is not accepted"),
        (["--kv-compress", "./model"], "the model before --kv-compress"),
        (["--kv-compress", "ratio=2", "--kv-compress-budget-tokens", "64"], "exclude each other"),
        (["--kv-compress", "/no/such/file.yaml"], "cannot read '/no/such/file.yaml'"),
        (["--kv-compress", "cak"], "unknown preset 'cak' (did you mean 'cake'?)"),
        (["--kv-compress", "cake", "--kv-compress", "ratio=2", "--kv-compress-mass", "0.5"],
         "exclude each other"),
        (["--kv-compress-query-stride", "5000"], "query_stride=5000 is not accepted"),
        (["--kv-compress-policy-options", "gama=1"], "did you mean 'gamma'?"),
        (["--kv-compress-speed", "9"], "unrecognized arguments: --kv-compress-speed"),
    ],
)  # fmt: skip
def test_bad_flags_end_parsing(flags, message, capsys) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_bad_additional_config_ends_before_the_engine() -> None:
    with pytest.raises(ValueError, match="unknown key 'ration'"):
        resolved("--additional-config", '{"kv_compress": {"ration": 8}}')
    with pytest.raises(ValueError, match=r"7 is not a mapping"):
        resolved("--additional-config", '{"kv_compress": 7}')


@pytest.mark.parametrize(
    "key",
    ["kv-compress", "kvcompress", "kvCompress", "kv_compression", "KV_COMPRESS", "kv_compres",
     "kv_compress_ratio", "kv_cache_compression", "--kv-compress"],
)  # fmt: skip
def test_a_misspelt_key_does_not_leave_compression_off(key: str) -> None:
    for value in ({"ratio": 8}, True, False):
        args = EngineArgs(str(MODEL), additional_config={key: value})
        with pytest.raises(ValueError, match=f"key '{key}' .* not accepted; it must be 'kv_comp"):
            args.create_engine_config()


@pytest.mark.parametrize("key", ["kv_cache", "compress", "kv_transfer", "keep", "x", ""])
def test_keys_of_others_are_theirs(key: str) -> None:
    args = EngineArgs(str(MODEL), additional_config={key: 1})
    assert args.create_engine_config().additional_config == {key: 1}


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--scheduler-cls", "some.Scheduler"], "scheduler_cls"),
        (["--worker-cls", "some.Worker"], "worker_cls"),
        (["--attention-backend", "FLASH_ATTN"], "attention_backend"),
    ],
)
def test_conflicting_parts_are_refused(flags: list[str], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=.* cannot be combined"):
        resolved("--kv-compress", *flags)


def test_wiring_is_idempotent() -> None:
    args = parse("--kv-compress")
    first = args.create_engine_config().additional_config
    assert args.create_engine_config().additional_config == first


@pytest.mark.parametrize(
    "command", [["serve"], ["bench", "throughput"], ["bench", "latency"]], ids=" ".join
)
def test_help_lists_every_flag_with_its_default(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.cli.main", *command, "--help=KVCompress"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    text = " ".join(result.stdout.split())
    assert f"Presets:{','.join(presets.names())}." in "".join(text.split())  # may break at "-"
    assert "for echo 15" in text
    for name in OPTIONS:
        assert f"--kv-compress-{name.replace('_', '-')}" in text
        assert f"Default: {default_text(name)}." in text
