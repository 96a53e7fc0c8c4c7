# SPDX-License-Identifier: Apache-2.0
"""``echo_scores`` over a whole prompt, as a share of what its prefill takes.

The model has the shape of Llama 3.1 8B: 32 layers of 4,096, 8 KV heads of 128 with 4 query heads
each, and an intermediate size of 14,336. Prefill is its matrix products and FlashAttention, in
chunks of 8,192 tokens; norms, activations, embedding and sampling are not counted, so the true
share is a little smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.batch import BLOCK_SIZE, GROUP, HEAD_SIZE, HEADS, SCALE, random_pages
from benchmarks.ops.decode import load_flash
from benchmarks.ops.timing import Report, seconds
from kvcompress_vllm import ops

MODEL_LAYERS, HIDDEN, INTERMEDIATE, CHUNK = 32, 4096, 14336, 8192
SEGMENT, SINKS, DELTA = 256, 4, 256
PROMPTS = (6000, 100_000)
LAYERS = 2  # that a pool holds; the time of one is multiplied


class Chunk:
    """The last ``new`` of ``tokens`` tokens, as the attention of a prefill step sees them."""

    def __init__(self, tokens: int, new: int, device: torch.device) -> None:
        self.tokens, self.new, self.device = tokens, new, device
        blocks = -(-tokens // BLOCK_SIZE)
        self.pages = random_pages((blocks + 1) * LAYERS * HEADS, device)
        self.table = (torch.randperm(blocks, device=device) + 1).int()[None]
        self.seq_lens = torch.tensor([tokens], dtype=torch.int32, device=device)
        unused = torch.zeros(1, LAYERS, HEADS, dtype=torch.int32, device=device)
        tables = (unused, unused, unused[:, 0, 0].contiguous(), None, 0)
        self.state = (-torch.ones_like(self.seq_lens), *tables)
        width = HEADS * HEAD_SIZE
        fused = torch.randn(new, (GROUP + 2) * width, device=device).bfloat16()
        self.query = fused[:, : GROUP * width].unflatten(1, (-1, HEAD_SIZE))
        first = tokens - new
        self.segments = torch.tensor(
            [[0, a, min(a + SEGMENT, tokens), a - first] for a in range(first, tokens, SEGMENT)],
            dtype=torch.int32,
            device=device,
        )
        angle = DELTA * 5e5 ** (-torch.arange(HEAD_SIZE // 2, device=device) * 2 / HEAD_SIZE)
        self.rotation = torch.stack([angle.cos(), angle.sin()], dim=-1)
        self.scores = torch.zeros(self.pages.shape[:2], device=device)

    def echo(self, layer: int) -> None:
        ops.echo_scores(
            self.query,
            self.pages,
            self.table,
            self.seq_lens,
            *self.state,
            self.segments,
            self.rotation,
            layer,
            SEGMENT,
            SINKS,
            False,
            SCALE,
            self.scores,
        )

    def echo_seconds(self) -> float:
        """Of one layer."""
        return seconds([partial(self.echo, layer) for layer in range(LAYERS)])

    def prefill_seconds(self, flash: Callable[..., Tensor] | None) -> float:
        """Of one layer: four matrix products and attention."""
        shapes = (
            (HIDDEN, (GROUP + 2) * HEADS * HEAD_SIZE),
            (HIDDEN, HIDDEN),
            (HIDDEN, 2 * INTERMEDIATE),
            (INTERMEDIATE, HIDDEN),
        )
        products = []
        for depth, width in shapes:
            x = torch.randn(self.new, depth, device=self.device).bfloat16()
            weights = torch.randn(width, depth, device=self.device).bfloat16()
            products.append(partial(torch.nn.functional.linear, x, weights))

        def linear() -> None:
            for product in products:
                product()

        query = self.query.contiguous()
        attend: Callable[[], object]
        if flash is None:
            shape = (1, HEADS, self.tokens, HEAD_SIZE)
            key, value = torch.randn(2, *shape, device=self.device).bfloat16()
            attend = partial(
                torch.nn.functional.scaled_dot_product_attention,
                query.transpose(0, 1)[None],
                key,
                value,
                is_causal=self.new == self.tokens,
                enable_gqa=True,
            )
        else:
            cache = self.pages.view(-1, LAYERS, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)[:, 0]
            keys, values = cache.transpose(1, 2).split(HEAD_SIZE, dim=-1)
            starts = torch.tensor([0, self.new], dtype=torch.int32, device=self.device)
            attend = partial(
                flash,
                query,
                keys,
                values,
                max_seqlen_q=self.new,
                cu_seqlens_q=starts,
                max_seqlen_k=self.tokens,
                seqused_k=self.seq_lens,
                block_table=self.table,
                softmax_scale=SCALE,
                causal=True,
            )
        return seconds([linear], 7) + seconds([attend], 7)

    def flops(self) -> float:
        """Multiplications and additions of ``echo`` in one layer: repetition, reading, sinks."""
        keys = sum(
            n * n + n * (n + 1) / 2 + n * SINKS
            for n in (self.segments[:, 2] - self.segments[:, 1]).tolist()
        )
        return 2 * HEAD_SIZE * GROUP * HEADS * keys

    def bytes(self) -> float:
        """Queries and keys in, scores out."""
        return self.new * HEADS * ((GROUP + 1) * HEAD_SIZE * 2 + 4)


def bench_echo(report: Report, device: torch.device) -> None:
    flash = load_flash()
    for tokens in PROMPTS:
        ends = [*range(CHUNK, tokens, CHUNK), tokens]
        begins = [0, *ends[:-1]]
        echo = prefill = flops = 0.0
        for new in {end - begin for begin, end in zip(begins, ends, strict=True)}:
            # Attention grows evenly with the context, so a chunk of mean context stands for all.
            same = [end for begin, end in zip(begins, ends, strict=True) if end - begin == new]
            torch.cuda.empty_cache()
            chunk = Chunk(sum(same) // len(same) // SEGMENT * SEGMENT if same[1:] else same[0], new,
                          device)  # fmt: skip
            times = chunk.echo_seconds(), chunk.prefill_seconds(flash)
            echo += len(same) * times[0] * MODEL_LAYERS
            prefill += len(same) * times[1] * MODEL_LAYERS
            flops += len(same) * chunk.flops() * MODEL_LAYERS
            report.add(
                "echo_scores",
                f"one layer, {new} tokens",
                times[0],
                chunk.bytes(),
                tflops=round(chunk.flops() / times[0] / 1e12),
            )
            del chunk
        report.add(
            "echo in prefill",
            f"{MODEL_LAYERS} layers, {tokens} tokens",
            echo,
            tflops=round(flops / echo / 1e12),
            prefill_us=round(prefill * 1e6),
            share_of_prefill=round(echo / prefill, 4),
        )
