# SPDX-License-Identifier: Apache-2.0
"""How many requests of a model fit a GPU, compressed and not: from its configuration alone. No
engine is started, and no weight is read.

Memory is counted as the worker counts it (``integration/worker/worker.py``); what vLLM measures at
startup, activations and CUDA graphs, is :data:`OVERHEAD`, a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvcompress_vllm import ops
from kvcompress_vllm.cache.page_format import PageFormat
from kvcompress_vllm.cache.state import PackedState
from kvcompress_vllm.compression.scratch import scratch_bytes, usable_policies
from kvcompress_vllm.config.combinations import BUDGETS
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.config.resolve import resolve
from kvcompress_vllm.integration.sizing import draft_tokens, few_heads, state_slots
from kvcompress_vllm.integration.start import pages
from kvcompress_vllm.integration.start.attention_kinds import full_layers
from kvcompress_vllm.integration.start.beside import Beside, beside
from kvcompress_vllm.integration.start.capacity_text import gib
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.integration.start.weights import weights
from kvcompress_vllm.records.group import CacheGroup
from kvcompress_vllm.scheduling.limits import Limits
from kvcompress_vllm.scheduling.sizes import Sizes
from kvcompress_vllm.scheduling.slots import num_observe_slots

RATIOS = (1, 2, 4, 8)
OVERHEAD = 2 << 30
"""Bytes that vLLM takes beside weights and KV cache."""


def examine(
    model: str, flags: Sequence[str], gpu_bytes: int | None, context: int | None
) -> dict[str, Any]:
    """Whether a model is compressed, and how many of its requests fit.

    Args:
        model: a folder, or a name that vLLM would download the configuration of.
        flags: of ``vllm serve``, those of compression included.
        gpu_bytes: memory of each GPU; None: only what needs no such number is told.
        context: tokens of a request, prompt and output; None: as many as the model takes.

    Returns:
        JSON-serialisable; sizes in bytes, per GPU where it says so. ``fits`` is a list of rows, by
        ratio and page dtype.

    Raises:
        ValueError: there is no such model, or vLLM does not take the flags.
    """
    load_general_plugins()  # type: ignore[no-untyped-call]
    length = [] if context is None else ["--max-model-len", str(context)]
    given = [*flags, *length]
    refusal = None
    try:
        config, args = _config(model, [*_compressing(flags), *given])
    except _RefusedError as refused:
        refusal = str(refused)
        config, args = _config(model, _without_ours(given))
    # vLLM's CPU platform sets a size of its own; asked for is only what the flag says.
    return _report(config, refusal, gpu_bytes, args.kv_cache_memory_bytes)


class _RefusedError(ValueError):
    """Compression does not take this model, or these flags."""


def _compressing(flags: Sequence[str]) -> list[str]:
    return [] if any(flag.startswith("--kv-compress") for flag in flags) else ["--kv-compress"]


def _without_ours(flags: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for flag in flags:
        if flag.startswith("--"):
            skip = flag.startswith("--kv-compress")
        if not skip:
            kept.append(flag)
    return kept


def _config(model: str, flags: Sequence[str]) -> tuple[VllmConfig, Any]:
    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> Any:
            raise ValueError(message)

    if model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        raise ValueError(f"there is no model at {model}")
    parser = AsyncEngineArgs.add_cli_args(Parser())  # type: ignore[no-untyped-call]
    args = parser.parse_args(["--model", model, *flags])
    try:
        return AsyncEngineArgs.from_cli_args(args).create_engine_config(), args
    except Exception as error:  # vLLM, transformers and the hub have many
        text = _brief(error)
        if "kv_compress: " in text:
            raise _RefusedError(text.partition("kv_compress: ")[2]) from error
        raise ValueError(f"vLLM does not take {model!r}: {text}") from error


def _brief(error: Exception) -> str:
    """What pydantic or another says, without the rest."""
    listed = getattr(error, "errors", None)
    text = listed()[0]["msg"] if callable(listed) else str(error)
    return text.strip().partition("\n")[0].removeprefix("Value error, ")


def _report(
    config: VllmConfig, refusal: str | None, gpu_bytes: int | None, cache_bytes: int | None
) -> dict[str, Any]:
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    layers = full_layers(config)
    stored = torch.empty((), dtype=pages.cache_dtype(config))
    report: dict[str, Any] = {
        "model": model.model,
        "architecture": ", ".join(model.architectures),
        "compressed": refusal is None,
        "refused": refusal,
        "layers": model.get_total_num_hidden_layers(),
        "compressed_layers": layers if refusal is None else [],
        "kv_heads": model.get_total_num_kv_heads(),
        "head_size": model.get_head_size(),
        "cache_dtype": str(stored.dtype).removeprefix("torch."),
        "block_size": cache.block_size or 16,
        "context": model.max_model_len,
        "gpus": parallel.world_size,
        "problems": [],
        "warnings": [],
    }
    token = report["kv_heads"] * report["head_size"] * 2 * stored.itemsize
    report["bytes_per_token"] = token * (len(layers) or report["layers"])
    if refusal is None:
        around = _around(config)
        report["block_size"] = around.block_size
        report["other_blocks"] = around.others.decoding(model.max_model_len)
        if around.others.groups:
            report["warnings"].append(
                f"of each request, {report['other_blocks']:,} blocks belong to layers that do not "
                "attend to everything: what fits their window or state, compressed or not"
            )
    found = weights(model.model, model.hf_text_config)
    report["weights"] = {"bytes": found.num_bytes, "source": found.source}
    if refusal is None:
        report["options"] = str(resolved_config(config))
        group = report["heads_per_gpu"] = model.get_num_kv_heads(parallel)
        few = few_heads(len(layers), group)
        if few is not None:
            report["warnings"].append(few)
        problem = ops.cuda_problem(
            report["head_size"],
            model.get_num_attention_heads(parallel) // group,
            around.block_size // around.kernel_blocks,
        )
        if problem is not None:
            report["problems"].append(f"{problem} is not supported on a GPU")
    else:
        report["problems"].append(refusal)
    if gpu_bytes is not None:
        _fit(report, config, gpu_bytes, cache_bytes)
    return report


def _model_dtype(config: VllmConfig) -> torch.dtype:
    dtype: Any = config.model_config.dtype
    found: torch.dtype = dtype
    return found


def _fit(
    report: dict[str, Any], config: VllmConfig, gpu_bytes: int, cache_bytes: int | None
) -> None:
    cache = config.cache_config
    share = cache.gpu_memory_utilization
    held = report["weights"]["bytes"] // report["gpus"]
    left = cache_bytes or int(gpu_bytes * share) - held - OVERHEAD
    report["memory"] = {
        "gpu_bytes": gpu_bytes,
        "utilization": share,
        "weights_bytes": held,
        "overhead_bytes": OVERHEAD,
        "cache_bytes": left,
    }
    report["fits"] = []
    if left <= 0:
        report["problems"].append(
            f"nothing is left for the KV cache: {gib(held)} of weights and about "
            f"{gib(OVERHEAD)} for vLLM, of {gib(gpu_bytes)} x {share}"
        )
        return
    configured = resolved_config(config)
    for page_dtype in ("auto", "fp8", "int4"):
        problem = pages.problem(config, PageFormat.of(page_dtype))
        for ratio in RATIOS:
            row: dict[str, Any] = {"ratio": ratio, "page_dtype": page_dtype, "requests": None}
            report["fits"].append(row)
            if configured is None and (ratio > 1 or page_dtype != "auto"):
                row["why"] = "not compressed"
            elif problem is not None:
                row["why"] = problem
            else:
                row |= _requests(config, configured, ratio, page_dtype, left, cache_bytes is None)
    if configured is not None:
        _fit_configured(report, config, configured, left, cache_bytes is None)


def _fit_configured(
    report: dict[str, Any],
    config: VllmConfig,
    configured: KVCompressConfig,
    left: int,
    shared: bool,
) -> None:
    """The options as they are given, whatever budget they have."""
    try:
        row = _requests(config, configured, None, configured.page_format.label, left, shared)
    except ValueError as error:
        report["problems"].append(str(error))
        return
    report["configured"] = row
    report["memory"]["beside_bytes"] = row["beside_bytes"]
    if not row["requests"]:
        report["problems"].append(
            f"a request of {report['context']:,} tokens does not fit: it needs "
            f"{row['reading']:,} blocks while it is read, and there are {row['blocks']:,}; "
            "--kv-compress-prefill-peak-tokens bounds that, or a smaller --context"
        )


def _requests(
    config: VllmConfig,
    configured: KVCompressConfig | None,
    ratio: int | None,
    page_dtype: str,
    available: int,
    shared: bool,
) -> dict[str, Any]:
    """Of the longest requests, how many are there at once while one more is read.

    Args:
        ratio: instead of the configured budget.
        available: bytes of a GPU for the KV cache.
        shared: and for what compression keeps beside it.
    """
    model, parallel = config.model_config, config.parallel_config
    own = configured or KVCompressConfig(ratio=1)
    if ratio is not None:
        free = {*BUDGETS, "min_ratio", "max_ratio"}
        options = {key: value for key, value in own.to_dict().items() if key not in free}
        own = KVCompressConfig.from_dict({**options, "ratio": ratio, "page_dtype": page_dtype})
    heads, around = model.get_num_kv_heads(parallel), _around(config)
    layers, block_size = len(full_layers(config)), around.block_size
    group = CacheGroup(
        layers=-(-layers // parallel.pipeline_parallel_size),
        heads=heads,
        queries_per_head=model.get_num_attention_heads(parallel) // heads,
        head_size=model.get_head_size(),
        block_size=block_size // around.kernel_blocks,
        kernel_blocks=around.kernel_blocks,
        itemsize=pages.cache_dtype(config).itemsize,
        scale=1.0,
        page_format=PageFormat.of(page_dtype),
    )
    # A block has room for a layer more where another group has one.
    block_bytes = group.block_bytes * around.layers // layers
    kept_beside = 0
    if configured is not None and shared:
        kept_beside = _kept_beside(config, own, group, available // block_bytes)
    blocks = max(0, available - kept_beside) // block_bytes
    length = model.max_model_len
    sizes = Sizes(resolve(own), Limits.of(own, block_size, length, around.kernel_blocks))
    whole, others = -(-length // block_size), around.others.decoding(length)
    packing = sizes.packed(length)
    full = whole + others
    packed = packing.held(full) if packing.gains else full
    peak = sizes.limits.peak_blocks
    reading = whole if peak is None or not packing.gains else min(whole, peak)
    reading += around.others.most(length)
    count = 0 if blocks < reading else (blocks - reading) // packed + 1
    return {
        "ratio": ratio,
        "page_dtype": page_dtype,
        "requests": count,
        "keys": min(1.0, packing.kept * sizes.blocks_per_page / max(1, packing.covered)),
        "blocks": blocks,
        "blocks_full": full,
        "blocks_packed": packed,
        "reading": reading,
        "beside_bytes": kept_beside,
    }


def _around(config: VllmConfig) -> Beside:
    """What stands beside the compressed layers."""
    model = config.model_config
    heads = model.get_num_kv_heads(config.parallel_config)
    token_bytes = heads * 2 * model.get_head_size() * pages.cache_dtype(config).itemsize
    return beside(config, token_bytes)


def _kept_beside(config: VllmConfig, own: KVCompressConfig, group: CacheGroup, blocks: int) -> int:
    """Bytes that compression allocates beside so many blocks, as the worker does."""
    scheduler, drafts = config.scheduler_config, draft_tokens(config)
    kernel_blocks = blocks * group.kernel_blocks
    slots = num_observe_slots(
        own, scheduler.max_num_batched_tokens, scheduler.max_num_seqs, kernel_blocks, group, drafts
    )
    state = PackedState(
        group,
        num_blocks=kernel_blocks,
        state_slots=state_slots(config, blocks),
        observe_slots=slots,
        window=own.ring(drafts),
        dtype=_model_dtype(config),
        device=torch.device("meta"),
        accumulated=own.query_stride > 0,
        echo=own.stores_echo,
    )
    longest = min(config.model_config.max_model_len, kernel_blocks * group.block_size)
    return state.num_bytes() + max(
        scratch_bytes(policy, longest, group, state.accumulated is not None)
        for policy in usable_policies(own)
    )
