# SPDX-License-Identifier: Apache-2.0
"""What a request's OpenTelemetry span says; over HTTP, `tests/installed/test_wheel.py` asks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.engine.output_processor import OutputProcessor

from kvcompress_vllm.integration.frontend import tracing, usage
from kvcompress_vllm.reporting.usage import Counts

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="OpenTelemetry is not installed")


def test_spans_say_what_compression_did(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from vllm.tracing import otel

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(otel.trace, "get_tracer", provider.get_tracer)
    tracing.install()
    tracing.install()  # once is enough

    times = dict.fromkeys(
        ("arrival_time", "scheduled_ts", "queued_ts", "first_token_ts", "last_token_ts"), 1.0
    )
    stats = SimpleNamespace(**times, first_token_latency=0.1, num_generation_tokens=5)
    counts = Counts(compressions=2, blocks_before=93, blocks_after=13, bytes_before=930)
    for name, told in (("compressed", counts), ("plain", None)):
        state = SimpleNamespace(
            stats=stats, prompt_token_ids=[1, 2, 3], prompt_embeds=None, external_req_id=name,
            top_p=None, max_tokens_param=None, temperature=None, n=None,
        )  # fmt: skip
        if told is not None:
            setattr(state, usage._COUNTS, told)
        output = SimpleNamespace(trace_headers=None)
        OutputProcessor.do_tracing(
            SimpleNamespace(), output, state, SimpleNamespace(iteration_timestamp=2.0)
        )
    compressed, plain = (dict(span.attributes) for span in exporter.get_finished_spans())
    assert compressed["gen_ai.request.id"] == "compressed" and plain["gen_ai.request.id"] == "plain"
    assert compressed["gen_ai.usage.prompt_tokens"] == 3
    for span, told in ((compressed, counts), (plain, Counts())):
        ours = {key: value for key, value in span.items() if key.startswith("kv_compress.")}
        assert ours == {f"kv_compress.{key}": value for key, value in told._asdict().items()}

    # A span of something else, made outside a request's, is left alone.
    otel.manual_instrument_otel("other", start_time=1)
    assert not exporter.get_finished_spans()[-1].attributes
