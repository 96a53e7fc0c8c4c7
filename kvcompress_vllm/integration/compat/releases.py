# SPDX-License-Identifier: Apache-2.0
"""What differs between vLLM's releases, asked of vLLM itself: by capability, never by version.

Overrides take and pass on whatever more vLLM gives them; only what cannot be done that way is here.
What each release changed, and how it was tested: ``docs/releases.md``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any


@cache
def vllm_places_layers() -> bool:
    """Whether vLLM lays all layers of a block out side by side itself, as our backend's layout
    asks (0.29 and later); before, the worker says where each layer lies."""
    from vllm.v1.kv_cache_interface import KVCacheTensor

    return "layers" in {field.name for field in fields(KVCacheTensor)}


def kv_cache_layouts(*names: str) -> tuple[Any, ...]:
    """Members of vLLM's ``KVCacheLayout``, which 0.29 and later ask of a backend."""
    from vllm.v1.kv_cache_layout import KVCacheLayout

    return tuple(KVCacheLayout[name] for name in names)


@cache
def batch_order_is_told() -> bool:
    """Whether vLLM tells metadata builders which request is in which row (0.30 and later)."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    return "req_idx" in {field.name for field in fields(CommonAttentionMetadata)}


@cache
def hits_count_when_admitted() -> bool:
    """Whether vLLM counts as hits of its prefix cache what an admitted request took of it (from
    0.27 on); before, what it had found, whatever our ``get_computed_blocks`` left of it."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    return hasattr(KVCacheManager, "record_prefix_cache_stats")


def cache_groups(vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    """The cache groups that vLLM makes of layers with these specs; 0.33 has moved it."""
    place = "vllm.v1.core.kv_cache_planning"
    module = import_module(place if find_spec(place) else "vllm.v1.core.kv_cache_utils")
    found: list[Any] = module.get_kv_cache_groups(vllm_config, dict(specs))
    return found


def hash_lookahead(vllm_config: Any) -> int:
    """Tokens behind a block on which its hash depends: with draft models newer releases have some,
    as the draft's keys of a token depend on the next."""
    return getattr(vllm_config, "num_hash_lookahead_tokens", 0)


def waiting_queues(scheduler: Any) -> list[Any]:
    """vLLM's queues of requests that wait, next first; 0.31 and later have but one."""
    skipped = getattr(scheduler, "skipped_waiting", None)
    return [scheduler.waiting] if skipped is None else [skipped, scheduler.waiting]


@contextmanager
def admitting(scheduler: Any, needed: bool) -> Iterator[None]:
    """Where needed, start requests although new ones are paused (``pause(mode="wait")``): a running
    one waits for them."""
    state = getattr(scheduler, "_pause_state", None)
    if not needed or state is None or state.name != "PAUSED_NEW":
        yield
        return
    scheduler._pause_state = type(state)["UNPAUSED"]
    try:
        yield
    finally:
        scheduler._pause_state = state


def sequences_at_a_time(limits: Any) -> int:
    """How many requests run at once.

    Args:
        limits: a scheduler, or the configuration of one; from 0.33 on it may admit fewer than it
            has room for.
    """
    names = ("max_num_running_reqs", "max_num_active_reqs", "max_num_seqs", "max_num_active_seqs")
    found: list[int | None] = [getattr(limits, name, None) for name in names]
    return min(count for count in found if count is not None)


def those_taken(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function of vLLM knows by name; what went needs no saying any more."""
    known = signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}


def authentication() -> Any:
    """vLLM's middleware that asks for API keys; moved in 0.29."""
    place = "vllm.entrypoints.serve.middleware.authenticate"
    if find_spec(place.rpartition(".")[0]) is None:
        place = "vllm.entrypoints.serve.utils.server_utils"
    return import_module(place).AuthenticationMiddleware


INITIALISERS = (
    ("vllm.entrypoints.launchers.api_server.app_state", "init_endpoint_plugins_state"),
    ("vllm.entrypoints.openai.api_server", "_init_endpoint_plugins_state"),
)
"""Module and name of the function that initialises a server's endpoint plugins: from 0.29 on, and
before."""


def plugin_initialiser() -> tuple[Any, str] | None:
    """The one of :data:`INITIALISERS` that is there; None: no server is loaded."""
    for module, name in INITIALISERS:
        found = sys.modules.get(module)
        if hasattr(found, name):
            return found, name
    return None
