"""A real OTLP receiver: the trace service of opentelemetry-proto on a port of its own, which can hang or refuse."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from cluster.telemetry.traces import SpanView
from tests.trace_lint import spans_of


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets. While it hangs it answers nobody, and keeps nothing."""

    def __init__(self, port: int = 0) -> None:
        self._lock = threading.Lock()
        self._messages: list[Any] = []
        self.hung = threading.Event()
        self._server: grpc.Server | None = None
        self.port = port
        self.start()

    def start(self) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(16), options=(("grpc.max_receive_message_length", 4 * 1024 * 1024),)
        )
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def kill(self) -> None:
        assert self._server is not None
        self._server.stop(0).wait(10)
        self._server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request: Any, context: Any) -> Any:
        if self.hung.is_set():
            while self.hung.is_set() and context.is_active():
                threading.Event().wait(0.02)
            context.abort(grpc.StatusCode.UNAVAILABLE, "hung")
        with self._lock:
            self._messages.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[SpanView]:
        with self._lock:
            return spans_of(self._messages)


@contextmanager
def http_collector() -> Iterator[tuple[str, Callable[[], list[SpanView]]]]:
    """(endpoint, what it has got): OTLP over HTTP with protobuf bodies; metrics are taken and forgotten."""
    messages: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                messages.append(trace_service_pb2.ExportTraceServiceRequest.FromString(body))
            self.send_response(200 if self.path in ("/v1/traces", "/v1/metrics") else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", lambda: spans_of(messages)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
