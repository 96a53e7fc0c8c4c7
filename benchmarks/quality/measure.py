# SPDX-License-Identifier: Apache-2.0
"""One engine answers the questions of many cells."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import FULL, Cell
from benchmarks.retrieval import TaskGen

MAX_ANSWER = 160
"""Tokens; the longest answers are copied passages of 90."""
WIDEST = 64
"""The widest window that a policy prefers: room for it lets one engine serve them all."""


def engine_of(cell: Cell) -> tuple[str, str]:
    """Cells with the same answer can share an engine.

    Ratio and policy can be each request's own; an allocator other than the policy's cannot.
    """
    return ("", "auto") if cell.allocator == "auto" else (cell.policy, cell.allocator)


def measure(args: argparse.Namespace, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """Start an engine, ask it, and yield one result per cell."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from kvcompress_vllm import LLM

    policy, allocator = engine_of(cells[0])
    # A policy's own window is used as far as there is room, which the base policy makes.
    shared = {"policy": "streaming", "window": WIDEST, "allow_policies": True}
    choice = {"policy": policy} if policy else shared
    options = {"ratio": 4, "allocator": allocator, **choice, **args.options}
    generator = TaskGen.load(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    llm = LLM(
        str(args.model),
        kv_compress=options,
        enable_prefix_caching=False,
        block_size=16,
        enforce_eager=args.enforce_eager,
        disable_log_stats=True,
    )
    end = tokenizer.eos_token_id
    for cell in cells:
        seeds = range(args.first_seed, args.first_seed + args.samples)
        pairs = [generator.task(cell.task, cell.length, seed) for seed in seeds]
        if cell.policy == FULL:
            extra: dict[str, Any] = {"kv_compress": False}
        else:
            extra = {"kv_compress_ratio": cell.ratio, "kv_compress_policy": cell.policy}
        sampling = [
            SamplingParams(
                temperature=0,
                max_tokens=min(MAX_ANSWER, len(tokenizer.encode(answer)) + 4),
                extra_args=extra,
            )
            for _, answer in pairs
        ]
        outputs = llm.generate([prompt for prompt, _ in pairs], sampling, use_tqdm=False)
        right = 0
        for output, (_, answer) in zip(outputs, pairs, strict=True):
            ids = list(output.outputs[0].token_ids)
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            # The whole answer and then the end of text: a longer one would be wrong.
            right += text == answer and ids[-1] == end
        yield cell._asdict() | {"right": right, "samples": len(pairs)}


def main() -> None:
    """Reads its cells and settings as JSON on stdin; writes one JSON line per cell."""
    request = json.load(sys.stdin)
    args = argparse.Namespace(**request["args"])
    args.model = Path(args.model)
    for result in measure(args, [Cell(*cell) for cell in request["cells"]]):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
