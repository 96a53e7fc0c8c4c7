# SPDX-License-Identifier: Apache-2.0
"""Point vLLM's engine at our scheduler, worker and attention backend; refuse what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from kvcompress_vllm import ops
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.start.flags import KEY, user_options
from kvcompress_vllm.integration.worker import backend

_SCHEDULER = "kvcompress_vllm.integration.engine.scheduler.make_scheduler"
_WORKER = "kvcompress_vllm.integration.worker.worker.KVCompressWorker"
_CPU_WORKER = "kvcompress_vllm.integration.cpu.worker.KVCompressCPUWorker"


def wire(engine_args: Any) -> KVCompressConfig | None:
    """Set the public fields of ``EngineArgs`` that select our parts; idempotent.

    Returns:
        The resolved configuration, None where compression is off.

    Raises:
        ValueError: bad options, or a field that the user set to something else.
    """
    config = user_options(engine_args.additional_config)
    if config is None:
        if isinstance(engine_args.additional_config, dict):
            engine_args.additional_config.pop(KEY, None)
        return None
    engine_args.additional_config = {**engine_args.additional_config, KEY: config.to_dict()}
    worker = _CPU_WORKER if current_platform.is_cpu() else _WORKER
    _set(engine_args, "scheduler_cls", _SCHEDULER, unset=None)
    _set(engine_args, "worker_cls", worker, unset="auto")
    _set(engine_args, "attention_backend", backend.register(), unset=None)
    if engine_args.block_size is None and current_platform.is_cpu():
        # vLLM's CPU default of 128 tokens per block would leave nothing to choose between.
        engine_args.block_size = 16
    return config


def _set(engine_args: Any, name: str, value: Any, unset: Any) -> None:
    current = getattr(engine_args, name)
    if current not in (unset, value):
        raise ValueError(
            f"kv_compress: {name}={current!r} cannot be combined with --kv-compress, "
            f"which needs its own"
        )
    setattr(engine_args, name, value)


class Refusal(NamedTuple):
    """A feature that compression does not work with."""

    feature: str
    setting: str
    applies: Callable[[VllmConfig], bool]


def _uses_sliding_window(config: VllmConfig) -> bool:
    layer_types = getattr(config.model_config.hf_text_config, "layer_types", None) or ()
    return (
        config.cache_config.sliding_window is not None
        or config.model_config.get_sliding_window() is not None
        or any("full_attention" not in kind for kind in layer_types)
    )


def _uses_quantised_kv(config: VllmConfig) -> bool:
    return config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32")


REFUSALS = (
    Refusal(
        "pooling and embedding models",
        "--runner pooling",
        lambda c: c.model_config.runner_type != "generate",
    ),
    Refusal("encoder-decoder models", "the model", lambda c: c.model_config.is_encoder_decoder),
    Refusal("multi-head latent attention (MLA)", "the model", lambda c: c.model_config.use_mla),
    Refusal(
        "hybrid (Mamba, linear attention) models",
        "the model",
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free,
    ),
    Refusal("sliding window or chunked local attention", "the model", _uses_sliding_window),
    Refusal("a quantised KV cache", "--kv-cache-dtype", _uses_quantised_kv),
    Refusal(
        "speculative decoding", "--speculative-config", lambda c: c.speculative_config is not None
    ),
    Refusal(
        "KV connectors and KV offloading",
        "--kv-transfer-config, --kv-offloading-size",
        lambda c: c.kv_transfer_config is not None,
    ),
    Refusal(
        "encoder cache transfer", "--ec-transfer-config", lambda c: c.ec_transfer_config is not None
    ),
    Refusal(
        "pipeline parallelism",
        "--pipeline-parallel-size",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
    ),
    Refusal(
        "decode context parallelism",
        "--decode-context-parallel-size",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
    ),
    Refusal(
        "prefill context parallelism",
        "--prefill-context-parallel-size",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
    ),
    Refusal("dual-batch overlap", "--enable-dbo", lambda c: c.parallel_config.use_ubatching),
    Refusal("sleep mode", "--enable-sleep-mode", lambda c: c.model_config.enable_sleep_mode),
    Refusal(
        "KV sharing between layers",
        "--kv-sharing-fast-prefill",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
    ),
    Refusal(
        "KV cache events",
        "--kv-events-config",
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
    ),
)
"""Checked in order once vLLM has resolved its configuration; also the table in the README."""


def check(vllm_config: VllmConfig) -> None:
    """Refuse what compression does not support, before the engine starts.

    Raises:
        ValueError: naming the feature and the setting that asks for it.
    """
    for refusal in REFUSALS:
        if refusal.applies(vllm_config):
            raise ValueError(
                f"kv_compress: {refusal.feature} is not supported together with "
                f"--kv-compress ({refusal.setting})"
            )
    if current_platform.is_cuda():
        check_kernels(vllm_config)


def check_kernels(vllm_config: VllmConfig) -> None:
    """Refuse shapes that the CUDA kernels are not built for.

    Raises:
        ValueError: naming the shape and what is accepted.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    problem = ops.cuda_problem(
        model.get_head_size(),
        model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel),
        vllm_config.cache_config.block_size or 16,
    )
    if problem is not None:
        raise ValueError(f"kv_compress: {problem} is not supported together with --kv-compress")
