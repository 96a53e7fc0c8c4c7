# SPDX-License-Identifier: Apache-2.0
"""How many requests run at once in the same KV cache: stock vLLM and several ratios.

    python -m benchmarks.capacity --kv-tokens 100000 --engines stock,2,4,8

Submits more prompts than can run and samples how many do. Takes the options of
``benchmarks.throughput``, whose table has the numbers, too; this one asks for enough requests.
"""

from __future__ import annotations

import sys

from benchmarks import throughput

DEFAULTS = ["--workloads", "512x6000+200", "--max-num-seqs", "512", "--repeats", "1"]


def main() -> None:
    sys.argv[1:] = [*DEFAULTS, *sys.argv[1:]]
    throughput.main()


if __name__ == "__main__":
    main()
