# SPDX-License-Identifier: Apache-2.0
"""Point vLLM's engine at our scheduler, worker and attention backend."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.integration.start.carried import Carried
from kvcompress_vllm.integration.start.flags import KEY, user_options
from kvcompress_vllm.integration.worker import backend
from kvcompress_vllm.policies import trial

logger = init_logger("vllm.kv_compress")

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
    config, failed = trial.allowed(config)
    for reason in failed.values():
        logger.warning("%s; requests cannot choose it", reason)
    options = Carried(config.to_dict())
    engine_args.additional_config = {**engine_args.additional_config, KEY: options}
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
