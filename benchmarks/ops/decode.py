# SPDX-License-Identifier: Apache-2.0
"""``paged_attention``: decode over even and ragged heads next to FlashAttention 3, and prefill."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.batch import GROUP, HEAD_SIZE, HEADS, SCALE, Decode
from benchmarks.ops.timing import Report, seconds
from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat

# Requests, mean keys per head, spread of their logarithm.
DECODES = (
    *((requests, mean, 1) for mean in (96, 750) for requests in (64, 256, 1024)),
    *((64, mean, 0) for mean in (96, 750, 6000)),
    (64, 6000, 1),
    (256, 3000, 1),
    (1, 6000, 1),
    (8, 1500, 1),
    (16, 30000, 1),
)

SPECULATIONS = (
    (64, 6000, 0),
    (64, 6000, 1),
    (64, 750, 1),
    (256, 3000, 1),
    (1, 6000, 1),
    (8, 1500, 1),
)
"""Requests, mean keys per head, spread of their logarithm; the goal is 1.15 at 6,000 keys."""

CODED = (
    *((64, mean, sigma) for mean in (750, 3000, 6000, 24000) for sigma in (0, 1)),
    (256, 750, 1),
    (256, 3000, 1),
    (1, 24000, 1),
    (16, 30000, 1),
)


PREFILLS = ((1, 2048, 6000), (1, 200, 6000), (8, 200, 6000), (8, 200, 24000), (8, 32, 6000))
"""Requests, tokens that each reads, keys per head."""


def bench_decode(report: Report, device: torch.device) -> None:
    flash = load_flash()
    for requests, mean, sigma in DECODES:
        torch.cuda.empty_cache()
        batch = Decode(requests, mean, sigma, device)
        batch.check()
        report.add(
            "decode",
            f"{requests} x {mean} keys, sigma {sigma}",
            seconds(batch.steps()),
            batch.bytes,
            requests=requests,
            mean=mean,
            sigma=sigma,
            flash_us=None if flash is None else round(flash_time(batch, flash) * 1e6, 2),
        )
        del batch


def bench_codes(report: Report, device: torch.device) -> None:
    """Decode with packed pages of codes: as many keys, and four times as many in int4's bytes."""
    for page_format in (PageFormat.FP8, PageFormat.INT4):
        for requests, mean, sigma in CODED:
            torch.cuda.empty_cache()
            batch = Decode(requests, mean, sigma, device, page_format=page_format)
            batch.check()
            case = f"{requests} x {mean} keys, sigma {sigma}"
            report.add(f"decode {page_format.label}", case, seconds(batch.steps()), batch.bytes)
            del batch


def bench_speculation(report: Report, device: torch.device) -> None:
    """A step that verifies four drafted tokens, next to one of single tokens over the same keys."""
    drafts = 4
    for requests, mean, sigma in SPECULATIONS:
        torch.cuda.empty_cache()
        single = Decode(requests, mean, sigma, device)
        time = seconds(single.steps())
        del single
        batch = Decode(requests, mean, sigma, device, tokens=1 + drafts)
        batch.check()
        case = f"{requests} x {mean} keys, sigma {sigma}, {drafts} drafted"
        found = seconds(batch.steps())
        of_single = round(found / time, 3)
        report.add("speculation", case, found, batch.bytes, drafts=drafts, times_single=of_single)
        print(f"{case}: {of_single} times a step of single tokens", flush=True)
        del batch


def bench_prefill(report: Report, device: torch.device) -> None:
    """Requests that read a chunk over what is packed: the next turns of conversations, and one
    long prompt."""
    flash = load_flash()
    for page_format in PageFormat:
        for requests, chunk, mean in PREFILLS:
            torch.cuda.empty_cache()
            batch = Decode(requests, mean, 0, device, page_format=page_format)
            shape = (requests * chunk, HEADS * GROUP, HEAD_SIZE)
            query = torch.randn(shape, device=device).bfloat16()
            start = torch.arange(requests + 1, dtype=torch.int32, device=device) * chunk
            out = torch.empty_like(query)
            steps = [
                partial(
                    ops.paged_attention, query, batch.pages, *batch.rows, start, layer, SCALE, out
                )
                for layer in range(batch.layers)
            ]
            time = seconds(steps)
            keys = int(batch.keys[:, 0].sum()) - requests * HEADS * chunk / 2
            flops = 4 * HEAD_SIZE * GROUP * chunk * keys
            compared = flash if page_format is PageFormat.AUTO else None
            report.add(
                f"prefill {page_format.label}",
                f"{requests} x {chunk} tokens over {mean} keys",
                time,
                tflops=round(flops / time / 1e12),
                flash_us=compared and round(flash_time(batch, compared, query) * 1e6, 2),
            )
            del batch


def load_flash() -> Callable[..., Tensor] | None:
    """vLLM's FlashAttention 3; None where it is missing or does not run."""
    try:
        from vllm.vllm_flash_attn import flash_attn_interface as interface
    except ImportError as error:
        print(f"no FlashAttention to compare with: {error}", flush=True)
        return None
    if not interface.is_fa_version_supported(3):
        print("no FlashAttention to compare with: it does not support this device", flush=True)
        return None
    return partial(interface.flash_attn_varlen_func, fa_version=3)


def flash_time(batch: Decode, flash: Callable[..., Tensor], asked: Tensor | None = None) -> float:
    """On the same pages, each (request, KV head) a sequence; its tables are made beforehand.

    Args:
        asked: queries of all requests, as many of each; None: those of the batch.
    """
    asked = batch.query if asked is None else asked
    tokens = asked.shape[0] // batch.requests
    query = asked.view(batch.requests, tokens, HEADS, GROUP, HEAD_SIZE)
    query = query.transpose(1, 2).reshape(-1, GROUP, HEAD_SIZE)
    sequences = batch.requests * HEADS
    keys, values = batch.pages[..., :HEAD_SIZE], batch.pages[..., HEAD_SIZE:]
    start = torch.arange(sequences + 1, dtype=torch.int32, device=batch.device) * tokens
    out = torch.empty_like(query)
    steps = []
    for layer in range(batch.layers):
        table, lengths = batch.sequences(layer)
        step = partial(
            flash,
            query,
            keys.unsqueeze(2),
            values.unsqueeze(2),
            max_seqlen_q=tokens,
            cu_seqlens_q=start,
            max_seqlen_k=int(lengths.max()),
            seqused_k=lengths,
            block_table=table,
            softmax_scale=SCALE,
            causal=True,
            out=out,
            num_splits=1 if sequences > 992 else 0,  # it balances splits up to here
        )
        steps.append(step)
    return seconds(steps)
