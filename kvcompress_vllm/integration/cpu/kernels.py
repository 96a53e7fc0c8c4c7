# SPDX-License-Identifier: Apache-2.0
"""The ops that vLLM's CUDA wheel lacks on CPU and a dense decoder calls in any case, in PyTorch.

Those that only newer releases call are at the end; where nobody calls them they do no harm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvcompress_vllm.integration.cpu import drafting, experts, rejection
from kvcompress_vllm.integration.cpu.activations import ACTIVATIONS

_LIBRARY: torch.library.Library | None = None


def init_cpu_memory_env(nodes: list[int]) -> None:
    """NUMA binding, which only the CPU build of vLLM has."""


def compute_slot_mapping(
    query_start: Tensor,
    positions: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
) -> None:
    """Slot of every token: ``block_table[row, position // B] * B + position % B``."""
    num_tokens = int(query_start[-1])
    row = torch.repeat_interleave(query_start.diff().long())
    position = positions[:num_tokens]
    block = block_table[row, position.div(block_size, rounding_mode="floor")].long()
    slot_mapping[:num_tokens] = block * block_size + position.remainder(block_size)


def greedy_argmax(logits: Tensor) -> Tensor:
    """0.32 and later."""
    return logits.argmax(dim=-1).view(-1)


def fused_gumbel_argmax(logits: Tensor, seeds: Tensor) -> Tensor:
    """Draw a token per row, reproducibly by the row's seed; 0.32 and later."""
    noise = torch.empty_like(logits)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return (logits - noise.log()).argmax(dim=-1).view(-1)


def register() -> None:
    """Define the ops in vLLM's namespace; idempotent."""
    global _LIBRARY
    if _LIBRARY is not None:
        return
    _LIBRARY = torch.library.Library("_C", "FRAGMENT")
    for schema, function in (
        ("init_cpu_memory_env(int[] nodes) -> ()", init_cpu_memory_env),
        (
            "compute_slot_mapping_kernel_impl(Tensor query_start, Tensor positions, "
            "Tensor block_table, Tensor(a!) slot_mapping, int block_size) -> ()",
            compute_slot_mapping,
        ),
        *(
            (f"{name}(Tensor! out, Tensor input) -> ()", function)
            for name, function in ACTIVATIONS.items()
        ),
        *rejection.OPS.items(),
        *drafting.OPS.items(),
        *experts.OPS.items(),
        ("greedy_argmax(Tensor logits) -> Tensor", greedy_argmax),
        ("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor", fused_gumbel_argmax),
    ):
        _LIBRARY.define(schema)
        _LIBRARY.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
