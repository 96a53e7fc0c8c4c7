# SPDX-License-Identifier: Apache-2.0
"""What compression did to a request, as attributes of its OpenTelemetry span.

vLLM makes a span per sequence once it has finished, where ``--otlp-traces-endpoint`` is given, and
ends it in the same call. The attributes have the names of :class:`Counts` behind ``kv_compress.``.
OpenTelemetry itself is vLLM's affair: nothing of it is imported here.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

from vllm.v1.engine import output_processor
from vllm.v1.engine.output_processor import OutputProcessor

from kvcompress_vllm.integration.frontend.usage import sequence_counts
from kvcompress_vllm.reporting.usage import Counts

_PATCHED = "_kv_compress_patched"
_counts: ContextVar[Counts | None] = ContextVar("kv_compress_counts", default=None)
"""Of the sequence whose span is being made."""


def install() -> None:
    """Have the spans of this process say it; idempotent."""
    if getattr(OutputProcessor, _PATCHED, False):
        return
    setattr(OutputProcessor, _PATCHED, True)
    stock_tracing = OutputProcessor.do_tracing
    stock_span = output_processor.instrument_manual  # type: ignore[attr-defined]

    @functools.wraps(stock_tracing)
    def do_tracing(
        self: Any, engine_core_output: Any, req_state: Any, *args: Any, **kwargs: Any
    ) -> None:
        token = _counts.set(sequence_counts(req_state))
        try:
            stock_tracing(self, engine_core_output, req_state, *args, **kwargs)
        finally:
            _counts.reset(token)

    @functools.wraps(stock_span)
    def instrument_manual(*args: Any, **kwargs: Any) -> Any:
        counts = _counts.get()
        if counts is not None:
            ours = {f"kv_compress.{name}": value for name, value in counts._asdict().items()}
            kwargs["attributes"] = {**(kwargs.get("attributes") or {}), **ours}
        return stock_span(*args, **kwargs)

    OutputProcessor.do_tracing = do_tracing  # type: ignore[method-assign]
    output_processor.instrument_manual = instrument_manual  # type: ignore[attr-defined]
