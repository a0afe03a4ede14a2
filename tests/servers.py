"""Servers that only look like one, for load generators: what they do wrong is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from cluster.rpc.v1 import control_pb2, control_pb2_grpc
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.rpc.v1 import inference_pb2_grpc as pb_grpc

Answer = Callable[[int, pb.GenerateRequest, Any], Iterator[int]]
"""(number of the request from 0, request, gRPC context) -> tokens of each chunk, one after another."""


class FakeInference(pb_grpc.InferenceServicer):
    """Answers as told; ``prompts`` are those it got."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._lock = answer, threading.Lock()
        self.prompts: list[tuple[int, ...]] = []

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateChunk]:
        with self._lock:
            number = len(self.prompts)
            self.prompts.append(tuple(request.prompt_ids.ids))
        for tokens in self._answer(number, request, context):
            yield pb.GenerateChunk(tokens=[pb.Token(id=1)] * tokens)

    def ModelInfo(self, request: pb.ModelInfoRequest, context: Any) -> pb.ModelInfoReply:
        return pb.ModelInfoReply(arch="fake", name="fake", dtype="fp32", vocab_size=50, context_length=100)


class FakeControl(control_pb2_grpc.ControlServicer):
    def Status(self, request: control_pb2.StatusRequest, context: Any) -> control_pb2.StatusReply:
        return control_pb2.StatusReply(state="serving")


@contextmanager
def fake_grpc(answer: Answer) -> Iterator[tuple[str, FakeInference]]:
    """(address, what answers there)."""
    server = grpc.server(ThreadPoolExecutor(64))
    inference = FakeInference(answer)
    pb_grpc.add_InferenceServicer_to_server(inference, server)
    control_pb2_grpc.add_ControlServicer_to_server(FakeControl(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", inference
    finally:
        server.stop(0).wait(10)


SseAnswer = Callable[[int, dict[str, Any]], tuple[int, list[bytes]]]
"""(number of the request from 0, body) -> HTTP status, pieces of the answer."""


@contextmanager
def fake_openai(answer: SseAnswer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, bodies it got)."""
    bodies: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, [json.dumps({"data": [{"id": "m", "max_model_len": 100}]}).encode()])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(bodies)
                bodies.append(body)
            self._send(*answer(number, body))

        def _send(self, status: int, pieces: list[bytes]) -> None:
            self.send_response(status)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)
                self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def event(**fields: Any) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(fields)}\n\n".encode()


DONE = b"data: [DONE]\n\n"
