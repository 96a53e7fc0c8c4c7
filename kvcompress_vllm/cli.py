# SPDX-License-Identifier: Apache-2.0
"""The command ``kvcompress-vllm``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from kvcompress_vllm import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="kvcompress-vllm", description="KV cache compression for vLLM."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor",
        help="is this installation fit to run?",
        description="Show versions, native kernels, whether vLLM still has what we rely on, "
        "plugins, and the defaults. Starts no engine. Status 0: all is well; 1: it cannot run.",
    )
    command.add_argument(
        "--wheel", metavar="FILE", help="what would break with the vLLM in this wheel? Only read"
    )
    command.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    from kvcompress_vllm.integration.start import doctor

    if arguments.wheel:
        try:
            report = doctor.examine_wheel(arguments.wheel)
        except ValueError as error:
            parser.error(str(error))
        text = doctor.render_wheel(report)
    else:
        report = doctor.examine()
        text = doctor.render(report)
    print(json.dumps(report, indent=2) if arguments.json else text)
    return int(bool(report["problems"]))
