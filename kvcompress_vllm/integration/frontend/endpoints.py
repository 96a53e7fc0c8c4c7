# SPDX-License-Identifier: Apache-2.0
"""What users see over HTTP: the page at ``/kv-compress``, and compression in the ``usage``.

An endpoint plugin in vLLM's sense, but loaded by ``--kv-compress``: as an entry point it would need
``VLLM_PLUGINS`` to name it, and would then be there without compression as well.
"""

from __future__ import annotations

import functools
import os
import time
from argparse import Namespace
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import State
from vllm import plugins
from vllm.config import VllmConfig

from kvcompress_vllm.config.rules import shown
from kvcompress_vllm.integration.compat import releases
from kvcompress_vllm.integration.frontend import access, checks
from kvcompress_vllm.integration.frontend.prometheus import KVCompressStatLogger
from kvcompress_vllm.integration.frontend.usage import report_in_usage
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.reporting.history import SECONDS, History
from kvcompress_vllm.reporting.page import html

PATH = "/kv-compress"
OPEN, API_KEY, OFF = "open", "api-key", "off"
_PATCHED = "_kv_compress_patched"
# Nothing is loaded from elsewhere, and nobody may frame it. The style of uPlot's elements is set by
# its script.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
NO_STATISTICS = (
    "vLLM keeps no statistics here (--disable-log-stats), so there is nothing to show. "
    "Compression itself works without them."
)


def page_access() -> str:
    """Who may see the page: ``KVCOMPRESS_PAGE``.

    Raises:
        ValueError: naming what is accepted.
    """
    value = os.environ.get("KVCOMPRESS_PAGE", OPEN)
    if value not in (OPEN, API_KEY, OFF):
        raise ValueError(
            f"kv_compress: KVCOMPRESS_PAGE={shown(value)} is not accepted; it must be {OPEN}, "
            f"{API_KEY} (its data asks for the server's API key) or {OFF}"
        )
    return value


def install() -> None:
    """Load :class:`KVCompressEndpoints` into servers built from now on; idempotent."""
    page_access()  # a bad value ends the command
    if getattr(plugins, _PATCHED, False):
        return
    setattr(plugins, _PATCHED, True)
    stock = plugins.load_endpoint_plugins

    @functools.wraps(stock)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*stock(*args, **kwargs), KVCompressEndpoints()]

    plugins.load_endpoint_plugins = load_endpoint_plugins
    # `vllm run-batch` builds no app, and so loads no plugins. Offline there is no server at all,
    # whose import would take a second.
    place = releases.plugin_initialiser()
    if place is not None:
        _init_without_app(*place)


def _init_without_app(server: Any, name: str) -> None:
    stock = getattr(server, name)

    @functools.wraps(stock)
    async def init_endpoint_plugins_state(engine_client: Any, state: Any, args: Any) -> None:
        if not hasattr(state, "endpoint_plugins"):
            state.endpoint_plugins = [KVCompressEndpoints()]
        await stock(engine_client, state, args)

    setattr(server, name, init_endpoint_plugins_state)


class KVCompressEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "kv_compress"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        from kvcompress_vllm.integration.frontend import contexts

        checks.check_bodies(app)
        app.include_router(contexts.router)
        if page_access() != OFF:
            app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        if page_access() == API_KEY and not access.api_keys(args):
            raise ValueError("kv_compress: KVCOMPRESS_PAGE=api-key needs --api-key or VLLM_API_KEY")
        report_in_usage(state)
        responses = getattr(state, "openai_serving_responses", None)
        if responses is not None:
            checks.check_at_call(responses)
        chat = getattr(state, "openai_serving_chat", None)
        if chat is not None:
            checks.check_batches(chat)
        messages = getattr(state, "anthropic_serving_messages", None)
        if messages is not None:
            checks.pass_xargs(messages)


router = APIRouter(tags=["kv-compress"])


async def _authorized(request: Request) -> None:
    """The key that vLLM's own routes ask for, where KVCOMPRESS_PAGE=api-key."""
    if page_access() == API_KEY:
        await access.authorized(request)


@router.head(PATH, include_in_schema=False)
@router.get(PATH, response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The live page, without data."""
    return HTMLResponse(html(), headers=_HEADERS)


@router.head(f"{PATH}/data", include_in_schema=False, dependencies=[Depends(_authorized)])
@router.get(f"{PATH}/data", dependencies=[Depends(_authorized)])
async def data(request: Request, since: float = Query(0.0, allow_inf_nan=False)) -> JSONResponse:
    """What the page shows.

    Args:
        since: Unix time in seconds; samples of later seconds only.
    """
    client = request.app.state.engine_client
    config: VllmConfig = client.vllm_config
    parallel = config.parallel_config
    about = {
        "model": config.model_config.served_model_name,
        "options": str(resolved_config(config)),
        "block_size": config.cache_config.block_size,
        "api_servers": parallel._api_process_count,
        "api_server": parallel._api_process_rank,
        "seconds": SECONDS,
    }
    history = _history(client)
    if history is None:
        return JSONResponse({**about, "no_data": NO_STATISTICS}, headers=_HEADERS)
    blocks = (config.cache_config.num_gpu_blocks or 0) - history.num_engines
    told = history.told(since, time.time())
    return JSONResponse({**about, "no_data": None, "blocks": blocks, **told}, headers=_HEADERS)


@router.get(f"{PATH}/requests", dependencies=[Depends(_authorized)])
async def requests(request: Request, id: str = Query(min_length=1)) -> JSONResponse:
    """What became of a request whose id is known: one of the last that were compressed.

    Args:
        id: of its response, or of its request to the engine.
    """
    history = _history(request.app.state.engine_client)
    found = {} if history is None else history.outcomes(id)
    told = [
        {"id": name, "compressions": [item._asdict() for item in items]}
        for name, items in found.items()
    ]
    return JSONResponse({"requests": told}, status_code=200 if told else 404, headers=_HEADERS)


def _history(client: Any) -> History | None:
    """What this process knows; None where vLLM keeps no statistics."""
    manager = getattr(client, "logger_manager", None)
    for logger in getattr(manager, "stat_loggers", ()):
        if isinstance(logger, KVCompressStatLogger):
            return logger.history
    return None
