# SPDX-License-Identifier: Apache-2.0
"""Check the CUDA ops, then time them: ``python -m benchmarks.ops [--only NAME] [--out FOLDER]``.

Runs the op tests first (``tests/ops``, all of them on CUDA), and every timed decode batch is
compared with plain PyTorch. Prints a JSON line per case, a table at the end, and leaves
``results.jsonl`` and ``decode.png`` in the folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ops.compression import bench_compression, bench_quantisation
from benchmarks.ops.copies import bench_copies
from benchmarks.ops.decode import bench_codes, bench_decode, bench_prefill, bench_speculation
from benchmarks.ops.echo import bench_echo
from benchmarks.ops.plot import plot_decode
from benchmarks.ops.timing import Report, copy_bandwidth
from kvcompress_vllm import ops

BENCHES: dict[str, Callable[[Report, torch.device], None]] = {
    "decode": bench_decode,
    "codes": bench_codes,
    "speculation": bench_speculation,
    "prefill": bench_prefill,
    "compression": bench_compression,
    "quantisation": bench_quantisation,
    "copies": bench_copies,
    "echo": bench_echo,
}


def verify() -> None:
    """The op tests, in a process of their own."""
    tests = Path(__file__).parents[2] / "tests" / "ops"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", str(tests)]
    if subprocess.run(command).returncode:
        sys.exit("the op tests fail: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", choices=BENCHES, help="one part")
    parser.add_argument("--no-tests", action="store_true", help="the op tests have just passed")
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks/ops"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    if missing := ops.missing_kernels("cuda"):
        parser.exit(1, f"nothing to time: {missing}\n")
    if not options.no_tests:
        verify()
    device = torch.device("cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "results.jsonl").open("w") as file:
        report = Report(copy_bandwidth(device), file)
        for name in [options.only] if options.only else BENCHES:
            BENCHES[name](report, device)
            torch.cuda.empty_cache()
    print(report.table())
    if decodes := [row for row in report.rows if row["op"] == "decode"]:
        plot_decode(decodes, options.out / "decode.png")


if __name__ == "__main__":
    main()
