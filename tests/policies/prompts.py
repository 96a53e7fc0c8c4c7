# SPDX-License-Identifier: Apache-2.0
"""Prompts for the parity tests, and their way through our compression."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcompress_vllm import ops
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.compressor import Compressor
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.records.plan import Compression
from kvcompress_vllm.scheduling.segments import SEGMENT, segments
from tests.policies import literal

MODEL = Path(__file__).parents[2] / "models" / "tiny"
BLOCK = 16


@cache
def random_prompt(length: int, seed: int, group: int = 2) -> literal.Attention:
    """Three layers of two heads; logits with a standard deviation of 3, some heads sharper."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # As the cache will hold them: the literal side must see the same numbers.
        return torch.randn(shape, generator=generator).double()

    layers, heads, size = 3, 2, 64
    sharpness = torch.tensor([[1.0, 3.0], [2.0, 5.0], [4.0, 3.0]]).double()[..., None, None, None]
    queries = normal(layers, heads, group, length, size) * sharpness
    queries = queries.float().double()
    return literal.causal(queries, normal(layers, heads, length, size),
                          normal(layers, heads, length, size))  # fmt: skip


@cache
def real_prompt(task: str, length: int) -> literal.Attention:
    """A task of the bundled model, with the attention that ``transformers`` computes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.masking_study import Llama
    from benchmarks.retrieval import TaskGen

    text, _ = TaskGen.load(MODEL).task(task, length, 100_000)
    ids = AutoTokenizer.from_pretrained(MODEL)(text, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.inference_mode():
        attentions = model(ids, output_attentions=True).attentions
    prompt = Llama(MODEL).prefill(ids[0].tolist())
    probabilities = torch.cat(attentions).unflatten(1, (prompt.keys.shape[1], -1)).double()
    return literal.Attention(
        prompt.keys.double(), prompt.values.double(), prompt.queries.double(), probabilities
    )


def setting(config: KVCompressConfig, length: int) -> literal.Setting:
    """The engine's numbers for a prompt."""
    return literal.Setting(
        window=config.window,
        pool=config.pool,
        recent=config.recent,
        sinks=config.sinks,
        block=BLOCK,
        kept=resolve(config).packed_blocks(length, BLOCK),
        floor=resolve(config).floor_pages(BLOCK),
    )


def compress(
    config: KVCompressConfig, prompts: list[literal.Attention], device: str = "cpu"
) -> list[list[list[int]]]:
    """Kept keys per (layer, head) of every prompt, from the worker's own compression, in a batch.

    Blocks are shuffled and memory that no prompt owns is NaN.
    """
    layers, heads, _, size = prompts[0].keys.shape
    group = prompts[0].queries.shape[2]
    counts = [-(-p.length // BLOCK) for p in prompts]
    num_blocks = 1 + 2 * sum(counts)
    free = (torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(1)) + 1).tolist()
    cache_ = torch.full((num_blocks, layers, heads, BLOCK, 2 * size), float("nan"))
    state = PackedState(
        CacheGroup(layers, heads, group, size, BLOCK, 4, size**-0.5), num_blocks=num_blocks,
        state_slots=len(prompts), observe_slots=len(prompts) + 1,
        window=config.window, dtype=torch.float32, device=torch.device(device),
        echo=config.stores_echo,
    )  # fmt: skip
    due = []
    for index, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        length, blocks = prompt.length, [free.pop() for _ in range(count)]
        kv = torch.cat([prompt.keys, prompt.values], -1).float()
        for place, block in enumerate(blocks):
            part = kv[:, :, place * BLOCK : (place + 1) * BLOCK]
            cache_[block, :, :, : part.shape[2]] = part
        positions = torch.arange(max(0, length - config.window), length)
        observed = prompt.queries[:, :, :, positions].flatten(1, 2).transpose(1, 2).float()
        state.ring[:, index + 1, positions % config.window] = observed.to(device)
        numbers = setting(config, length)
        due.append(
            Compression(
                request_id=str(index),
                num_tokens=length,
                old_covered=0,
                old_kept=0,
                covered=length // BLOCK,
                old_blocks=blocks,
                new_blocks=[free.pop() for _ in range(numbers.kept)],
                state_slot=index,
                observe_slot=index + 1,
            )
        )
    pages = cache_.view(-1, BLOCK, 2 * size).to(device)
    if state.echo is not None:
        for prompt, item in zip(prompts, due, strict=True):
            _score(state, pages, prompt, item.old_blocks, config.sinks)
    compressor = Compressor(config, state, pages)
    compressor.record = {}
    compressor.run(due)
    return [[keys.tolist() for keys in compressor.record[item.request_id]] for item in due]


def _score(
    state: PackedState, pages: Tensor, prompt: literal.Attention, row: list[int], sinks: int
) -> None:
    """Store the echo scores of a prompt, as its prefill would."""
    device, size = pages.device, pages.shape[2] // 2
    rows = torch.tensor([row], dtype=torch.int32, device=device)
    found = [[0, *segment, segment[0]] for segment in segments(0, prompt.length)]
    angles = literal.angles(size).float()
    rotation = torch.stack([angles.cos(), angles.sin()], -1).to(device)
    for layer, queries in enumerate(prompt.queries):
        ops.echo_scores(
            queries.flatten(0, 1).transpose(0, 1).float().contiguous().to(device), pages, rows,
            torch.tensor([prompt.length], dtype=torch.int32, device=device),
            state.state_slots(rows), *state.tables,
            torch.tensor(found, dtype=torch.int32, device=device), rotation, layer, SEGMENT, sinks,
            False, size**-0.5, state.echo,
        )  # fmt: skip


def config(policy: str, **options: Any) -> KVCompressConfig:
    return KVCompressConfig.from_dict({"policy": policy, **options})
