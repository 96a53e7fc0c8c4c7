# SPDX-License-Identifier: Apache-2.0
"""Collects the OpenTelemetry spans that a server exports, over HTTP."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class Collector:
    """Stands in for an OTLP endpoint."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        spans = self.spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                spans.extend(decoded(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}/v1/traces"

    def __enter__(self) -> Collector:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, request_id: str) -> list[dict[str, Any]]:
        """The attributes of the spans of a request, once there are any."""
        for _ in range(300):
            found = [span for span in self.spans if span.get("gen_ai.request.id") == request_id]
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"no span of {request_id} among {self.spans}")


def decoded(body: bytes) -> list[dict[str, Any]]:
    """The attributes of every span of an export."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    request = ExportTraceServiceRequest.FromString(body)
    return [
        {a.key: getattr(a.value, str(a.value.WhichOneof("value"))) for a in span.attributes}
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
