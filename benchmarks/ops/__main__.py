# SPDX-License-Identifier: Apache-2.0
"""Check every native op against the reference on hostile inputs, then time it.

    python -m benchmarks.ops [--device cuda|cpu] [--only NAME] [--no-bench]

Nothing is timed unless every check passed; the CPU ops are checked, not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.ops import benches, checks, cuda_checks
from benchmarks.ops.checker import Checker
from benchmarks.ops.timing import Table, copy_bandwidth
from kvcompress_vllm import ops

CHECKS: dict[str, Callable[[Checker], None]] = {
    "copies": checks.check_copies,
    "attention": checks.check_attention,
    "statistics": checks.check_statistics,
    "selection": checks.check_selection,
}
CUDA_CHECKS: dict[str, Callable[[Checker], None]] = {
    "graph": cuda_checks.check_graph,
    "large_pool": cuda_checks.check_large_pool,
}
# Each with the checks that it relies on.
BENCHES: tuple[tuple[set[str], Callable[[Table, torch.device], None]], ...] = (
    ({"copies"}, benches.bench_copies),
    ({"attention"}, benches.bench_decode),
    ({"attention"}, benches.bench_prefill),
    ({"statistics", "selection"}, benches.bench_compression),
)


def verify(device: torch.device, names: list[str]) -> bool:
    """Run the checks; a crash fails a check, and the others still run."""
    run = Checker(device)
    for name in names:
        torch.manual_seed(0)
        begin = time.perf_counter()
        try:
            (CHECKS | CUDA_CHECKS)[name](run)
        except Exception:
            run.check(name, False, traceback.format_exc())
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    print(f"{run.passed} checks passed, {len(run.failed)} failed", flush=True)
    return not run.failed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=(*CHECKS, *CUDA_CHECKS), help="one part")
    parser.add_argument("--no-bench", action="store_true", help="only check")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu checks the CPU ops")
    if options.only in CUDA_CHECKS and not cuda:
        parser.error(f"--only {options.only} needs --device cuda")
    if missing := ops.missing_kernels(options.device):
        parser.exit(1, f"nothing to check: {missing}\n")
    names = [options.only] if options.only else [*CHECKS, *(CUDA_CHECKS if cuda else ())]
    device = torch.device(options.device)
    if not verify(device, names):
        sys.exit(1)
    wanted = [bench for needs, bench in BENCHES if needs & set(names)]
    if not cuda or options.no_bench or not wanted:
        return
    table = Table(copy_bandwidth(device))
    for bench in wanted:
        bench(table, device)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
