# SPDX-License-Identifier: Apache-2.0
"""``write_kv`` and ``observe_queries`` on the tokens of a large step."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.ops.batch import BLOCK_SIZE, GROUP, HEAD_SIZE, HEADS, random_pages
from benchmarks.ops.timing import Report, seconds
from kvcompress_vllm import ops


def bench_copies(report: Report, device: torch.device) -> None:
    tokens, blocks, layers = 8192, 2048, 4
    width = HEADS * HEAD_SIZE
    cache = random_pages(blocks * layers * HEADS, device)
    cache = cache.view(blocks, layers, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    slots = torch.randperm(blocks * BLOCK_SIZE, device=device)[:tokens]
    index = torch.arange(tokens, device=device, dtype=torch.int32)
    ring = torch.zeros(layers, tokens, HEADS * GROUP, HEAD_SIZE, device=device).bfloat16()
    writes, observations = [], []
    for layer in range(layers):
        fused = torch.randn(tokens, (GROUP + 2) * width, device=device).bfloat16()
        query, key, value = (
            part.unflatten(1, (-1, HEAD_SIZE))
            for part in fused.split([GROUP * width, width, width], dim=1)
        )
        writes.append(partial(ops.write_kv, key, value, cache[:, layer], slots))
        observations.append(partial(ops.observe_queries, query, index, ring[layer]))
    case = f"{tokens} tokens"
    report.add("write_kv", case, seconds(writes), 8 * tokens * width)
    report.add("observe_queries", case, seconds(observations), 4 * tokens * GROUP * width)
