# SPDX-License-Identifier: Apache-2.0
"""The commands in the documents take the arguments that are written there."""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvcompress_vllm.integration.start.flags import user_options
from tests.documents.reading import blocks, name
from tests.integration.simulation import MODEL

COMMANDS = [
    pytest.param(shlex.split(command), id=f"{name(block.path)}: {command[:60]}")
    for block in blocks()
    for command in block.commands()
]


def of(*programs: str) -> list[Any]:
    return [each for each in COMMANDS if any(word in programs for word in each.values[0][:2])]


class Parsed(Exception):  # noqa: N818
    """What follows would run."""


@pytest.mark.parametrize("command", of("python", ".venv/bin/python"))
def test_modules_take_their_arguments(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run up to where the arguments are parsed."""
    module, *arguments = command[command.index("-m") + 1 :]
    if module == "pytest":
        pytest.skip("tests/mutation.py's own options come with a plugin")
    if ">" in arguments:
        arguments = arguments[: arguments.index(">")]
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self: Any, *given: Any, **options: Any) -> Any:
        parse(self, *given, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("command", [each for each in of("vllm") if each.values[0][1] == "serve"])
def test_servers_take_their_flags(command: list[str]) -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    # The policy of examples/policy, which is not installed here, is as good as any.
    flags = [word.replace("loudest", "snapkv") for word in command[3:]]
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", str(MODEL), *flags]))
    assert user_options(args.additional_config) is not None
