# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry points into this package. Import-light: vLLM loads them in every process.

Everything that is patched is patched here, once per process, and listed in ``hooks``. Without
``--kv-compress`` the wrappers pass straight through.
"""

from __future__ import annotations

import functools
import os
from typing import Any

_CPU_PLATFORM = "kvcompress_vllm.integration.cpu.platform.KVCompressCpuPlatform"
_PATCHED = "_kv_compress_patched"


def cpu_platform() -> str | None:
    """Entry point ``vllm.platform_plugins``: run vLLM's CUDA wheel on a machine without GPU.

    Steps aside where any platform of vLLM's own is available (a GPU, or vLLM's CPU build), and
    where ``KVCOMPRESS_CPU_PLATFORM=0`` forbids it.
    """
    if os.environ.get("KVCOMPRESS_CPU_PLATFORM", "1") == "0":
        return None
    from vllm.platforms import builtin_platform_plugins

    if any(plugin() is not None for plugin in builtin_platform_plugins.values()):
        return None
    return _CPU_PLATFORM


def register() -> None:
    """Entry point ``vllm.general_plugins``: add the flags and wire the engine. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs, _PATCHED, False):
        return
    setattr(EngineArgs, _PATCHED, True)
    _patch_arguments(EngineArgs)
    _patch_engine_config(EngineArgs)
    _patch_requests()
    _patch_executors()


def _patch_arguments(engine_args: Any) -> None:
    stock_add, stock_from = engine_args.add_cli_args, engine_args.from_cli_args.__func__

    @functools.wraps(stock_add)
    def add_cli_args(parser: Any) -> Any:
        from kvcompress_vllm.integration.start.flags import add_arguments

        parser = stock_add(parser)
        add_arguments(parser)
        return parser

    @functools.wraps(stock_from)
    def from_cli_args(cls: Any, args: Any) -> Any:
        from kvcompress_vllm.integration.start.flags import merge_arguments

        merge_arguments(args)
        return stock_from(cls, args)

    engine_args.add_cli_args = staticmethod(add_cli_args)
    engine_args.from_cli_args = classmethod(from_cli_args)


def _patch_engine_config(engine_args: Any) -> None:
    stock = engine_args.create_engine_config

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from kvcompress_vllm.integration.start.refusals import check
        from kvcompress_vllm.integration.start.wiring import wire

        config = wire(self)
        if config is not None:
            from kvcompress_vllm.integration.frontend import checks

            checks.refuse_rust_frontend()
        vllm_config = stock(self, *args, **kwargs)
        if config is not None:
            check(vllm_config)
            _install_front_end()
        return vllm_config

    engine_args.create_engine_config = create_engine_config


def _install_front_end() -> None:
    """In the process in which an engine's client is made, before it is; idempotent."""
    from kvcompress_vllm.integration.frontend import checks, endpoints, prometheus, tracing, usage

    checks.install()
    prometheus.install()
    usage.install()
    tracing.install()
    endpoints.install()


def _patch_executors() -> None:
    from vllm.v1.executor.abstract import Executor

    stock = Executor.get_class

    @functools.wraps(stock)
    def get_class(vllm_config: Any) -> Any:
        from kvcompress_vllm.integration.start.flags import resolved_config

        found = stock(vllm_config)
        if not found.uses_ray or resolved_config(vllm_config) is None:
            return found
        # Not as `distributed_executor_backend`: vLLM's workers compare that with "ray".
        from kvcompress_vllm.integration.start import ray_nodes

        return ray_nodes.looking_at_nodes(found)

    Executor.get_class = staticmethod(get_class)


def _patch_requests() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    stock, stock_init = InputProcessor.process_inputs, InputProcessor.__init__

    @functools.wraps(stock_init)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        from kvcompress_vllm.integration.start.flags import resolved_config

        # The first thing that a client makes; its configuration may come from another process.
        if resolved_config(vllm_config) is not None:
            _install_front_end()
        stock_init(self, vllm_config, *args, **kwargs)

    @functools.wraps(stock)
    def process_inputs(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        from kvcompress_vllm.integration.start.flags import resolved_config

        config = resolved_config(self.vllm_config)
        if config is None:
            return stock(self, request_id, prompt, params, *args, **kwargs)
        from kvcompress_vllm.integration.frontend.checks import bad_request
        from kvcompress_vllm.integration.frontend.requests import (
            check_context,
            check_length,
            check_request,
            check_sharing,
            check_token_ids,
            send_budget,
        )

        with bad_request():
            budget = check_request(config, params, kwargs.get("resumable", False))
        request = stock(self, request_id, prompt, params, *args, **kwargs)
        with bad_request():
            check_token_ids(request)
            check_length(config, self.vllm_config, request, budget)
            check_context(config, request)
            check_sharing(self.vllm_config, request, budget)
            send_budget(budget, request.sampling_params)
        return request

    InputProcessor.__init__ = __init__  # type: ignore[method-assign]
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]
