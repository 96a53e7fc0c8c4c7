# SPDX-License-Identifier: Apache-2.0
"""What users see over HTTP: the page at ``/kv-compress``, and compression in the ``usage``.

An endpoint plugin in vLLM's sense, but loaded by ``--kv-compress``: as an entry point it would need
``VLLM_PLUGINS`` to name it, and would then be there without compression as well.
"""

from __future__ import annotations

import functools
import time
from argparse import Namespace
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.datastructures import State
from vllm import plugins
from vllm.config import VllmConfig

from kvcompress_vllm.integration.frontend.prometheus import KVCompressStatLogger
from kvcompress_vllm.integration.frontend.usage import report_in_usage
from kvcompress_vllm.integration.start.flags import resolved_config
from kvcompress_vllm.reporting.history import COLUMNS, SECONDS, History

PATH = "/kv-compress"
_PATCHED = "_kv_compress_patched"
# Nothing is loaded from elsewhere. The style of uPlot's elements is set by its script.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:"
)
NO_STATISTICS = (
    "vLLM keeps no statistics here (--disable-log-stats), so there is nothing to show. "
    "Compression itself works without them."
)


def install() -> None:
    """Load :class:`KVCompressEndpoints` into servers built from now on; idempotent."""
    if getattr(plugins, _PATCHED, False):
        return
    setattr(plugins, _PATCHED, True)
    stock = plugins.load_endpoint_plugins

    @functools.wraps(stock)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        return [*stock(*args, **kwargs), KVCompressEndpoints()]

    plugins.load_endpoint_plugins = load_endpoint_plugins


class KVCompressEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "kv_compress"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        report_in_usage(
            getattr(state, "openai_serving_chat", None),
            getattr(state, "openai_serving_completion", None),
        )


router = APIRouter(tags=["kv-compress"])


@router.get(PATH, response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """The live page."""
    return HTMLResponse(_page(), headers={"Content-Security-Policy": _POLICY})


@router.get(f"{PATH}/data")
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
        return JSONResponse({**about, "no_data": NO_STATISTICS})
    now = time.time()
    totals = history.totals
    return JSONResponse(
        {
            **about,
            "no_data": None,
            "time": now,
            "engines": history.num_engines,
            "blocks": (config.cache_config.num_gpu_blocks or 0) - history.num_engines,
            "columns": COLUMNS,
            "samples": history.samples(since, now),
            "now": history.gauges()._asdict(),
            "totals": {**vars(totals), "kept_ratio": totals.kept_ratio()},
            "kept_pages": history.mean_kept_pages(),
        }
    )


def _history(client: Any) -> History | None:
    """What this process knows; None where vLLM keeps no statistics."""
    manager = getattr(client, "logger_manager", None)
    for logger in getattr(manager, "stat_loggers", ()):
        if isinstance(logger, KVCompressStatLogger):
            return logger.history
    return None


@functools.cache
def _page() -> str:
    """One file: page.html with the library it draws with inside."""
    folder = resources.files("kvcompress_vllm") / "page"
    text = (folder / "page.html").read_text("utf-8")
    for name in ("uPlot.min.css", "uPlot.iife.min.js"):
        text = text.replace(f"/* {name} */", (folder / name).read_text("utf-8"))
    return text
