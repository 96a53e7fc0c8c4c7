# SPDX-License-Identifier: Apache-2.0
"""Of ``integration/start/``: what is put in place before an engine starts."""

from __future__ import annotations

from kvcompress_vllm.integration.compat.hooks.hook import Hook

_ARGS = "vllm.engine.arg_utils:EngineArgs"

HOOKS = (
    Hook(f"{_ARGS}.add_cli_args", ("parser",), "adds the --kv-compress flags",
         "vLLM lets general plugins add flags", patched=True),
    Hook(f"{_ARGS}.from_cli_args", ("args",), "moves the flags into additional_config",
         "vLLM lets general plugins add flags", patched=True),
    Hook(f"{_ARGS}.create_engine_config", ("self", "usage_context", "headless"),
         "selects our scheduler, worker and backend, and refuses what is unsupported",
         "vLLM has a plugin hook that edits the configuration", patched=True),
    Hook("vllm.v1.executor.abstract:Executor.get_class", ("vllm_config",),
         "hands out executors on Ray that look at their nodes",
         "a node without a plugin that the configuration names is an error", patched=True),
    Hook("vllm.v1.executor.ray_utils:initialize_ray_cluster",
         ("parallel_config", "ray_address"),
         "makes the placement group whose nodes are looked at", "as Executor.get_class"),
    Hook("vllm.v1.executor.ray_executor:RayDistributedExecutor._init_executor", ("self",),
         "looks at the nodes first", "vLLM 0.32 is no longer supported", until="0.33"),
)  # fmt: skip
