# SPDX-License-Identifier: Apache-2.0
"""The command ``kvcompress-vllm``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from kvcompress_vllm import __version__

_EPILOG = """\
examples:
  kvcompress-vllm doctor
  kvcompress-vllm doctor --model MODEL --gpu-memory 80G --context 32k --kv-compress page_dtype=fp8
  kvcompress-vllm doctor --url http://127.0.0.1:8000
"""
_FACTORS = {"": 1, "k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30}


def _number(text: str) -> int:
    """``32k`` is 32,000 and ``32K`` 32,768, as in vLLM's own flags."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)(?:i?B)?", text)
    number = int(float(found[1]) * _FACTORS[found[2]]) if found else 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not accepted; it must be a number above 0, such as 80G or 32k"
        )
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="kvcompress-vllm", description="KV cache compression for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor",
        help="is this installation fit to run? what fits a GPU? what does a server do?",
        description="Without arguments: versions, native kernels, whether vLLM still has what we "
        "rely on, plugins, and the defaults. Starts no engine. Status 0: all is well; 1: it is "
        "not; 2: the question makes no sense.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    about = command.add_mutually_exclusive_group()
    about.add_argument(
        "--wheel", metavar="FILE", help="what would break with the vLLM in this wheel? Only read"
    )
    about.add_argument(
        "--model",
        help="is this model compressed, and how many of its requests fit? From its configuration "
        "alone. Takes the flags of vllm serve, too: --kv-compress, --tensor-parallel-size, ...",
    )
    about.add_argument("--url", help="what does this running server do, and why? Reads /metrics")
    command.add_argument(
        "--gpu-memory", type=_number, metavar="80G", help="of each GPU; default: of the one here"
    )
    command.add_argument(
        "--context",
        type=_number,
        metavar="32k",
        help="tokens of a request, prompt and output; default: as many as the model takes",
    )
    command.add_argument("--api-key", help="with --url, of a server whose page asks for it")
    command.add_argument("--json", action="store_true", help="for programs")
    arguments, flags = parser.parse_known_args(argv)
    if flags and arguments.model is None:
        command.error(f"unrecognized arguments: {' '.join(flags)}")
    if arguments.model is None and (arguments.gpu_memory or arguments.context):
        command.error("--gpu-memory and --context are about a --model")
    if arguments.url is None and arguments.api_key:
        command.error("--api-key is about a --url")
    try:
        report, text = _doctor(arguments, flags)
    except ValueError as error:
        command.error(str(error))
    print(json.dumps(report, indent=2) if arguments.json else text)
    return int(bool(report["problems"]))


def _doctor(arguments: argparse.Namespace, flags: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The report, and the same for people."""
    if arguments.url:
        from kvcompress_vllm.reporting import explained

        report = explained.examine(arguments.url, arguments.api_key)
        return report, explained.render(report)
    from kvcompress_vllm.integration.start import doctor

    if arguments.wheel:
        report = doctor.examine_wheel(arguments.wheel)
        return report, doctor.render_wheel(report)
    if arguments.model:
        doctor.quieten()
        from kvcompress_vllm.integration.start import capacity
        from kvcompress_vllm.integration.start.capacity_text import render

        gpu_bytes = arguments.gpu_memory or doctor.gpu_memory()
        report = capacity.examine(arguments.model, flags, gpu_bytes, arguments.context)
        return report, render(report)
    report = doctor.examine()
    return report, doctor.render(report)
