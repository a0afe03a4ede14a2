"""A client of the gRPC API: typed errors instead of statuses, and with a tracer a trace for every request."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

from cluster.api.client_tracing import ClientTracer
from cluster.errors import ERROR_BY_CODE, ConfigError, ExpertMeshError, InternalError
from cluster.rpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:9000"


class Refused(ExpertMeshError):
    """The server found the request wrong; its message names field, value and limit."""

    code = "INVALID_ARGUMENT"


class Client:
    """One channel to one router. Use as a context manager. With a ``tracer`` traces begin here.

    Methods raise `ExpertMeshError`: Unavailable when nobody listens, Refused for bad input, and so on.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, timeout_s: float = 600.0, tracer: ClientTracer | None = None
    ) -> None:
        self.address, self._timeout_s = address, timeout_s
        self._tracer = None if tracer is None or tracer.off else tracer
        options = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0))
        self._channel = grpc.insecure_channel(address, options=options)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def generate(
        self, request: inference_pb2.GenerateRequest, trace_layers: bool = False
    ) -> Iterator[inference_pb2.GenerateChunk]:
        """Chunks as they come. Closing the iterator cancels the request. ``trace_layers`` asks the server for traces of
        single layers of its first steps."""
        trace = self._tracer.begin() if self._tracer is not None else None
        metadata = trace.metadata() if trace is not None else ()
        if trace_layers:
            metadata = (*metadata, ("x-moe-trace-detail", "layer"))
        call = self._inference.Generate(request, timeout=self._timeout_s, metadata=metadata)
        error = ""
        try:
            if trace is None:
                yield from call
                return
            for chunk in call:
                trace.got(len(chunk.tokens))
                yield chunk
                trace.asked()
        except grpc.RpcError as exc:
            error = exc.code().name
            raise self._typed(exc) from exc
        finally:
            call.cancel()
            if trace is not None:
                trace.end(error)

    def model_info(self) -> inference_pb2.ModelInfoReply:
        """What is served."""
        reply: inference_pb2.ModelInfoReply = self._unary(self._inference.ModelInfo, inference_pb2.ModelInfoRequest())
        return reply

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._unary(self._inference.Tokenize, inference_pb2.TokenizeRequest(text=text)).ids)

    def status(self) -> control_pb2.StatusReply:
        """How the system is."""
        reply: control_pb2.StatusReply = self._unary(self._control.Status, control_pb2.StatusRequest())
        return reply

    def loads(self) -> control_pb2.LoadsReply:
        """How often each expert was wanted since the server's start."""
        reply: control_pb2.LoadsReply = self._unary(self._control.Loads, control_pb2.LoadsRequest())
        return reply

    def set_tracing(self, on: bool) -> bool:
        """Switches the server's traces on or off; how they were before."""
        reply: control_pb2.SetTracingReply = self._unary(self._control.SetTracing, control_pb2.SetTracingRequest(on=on))
        return reply.was_on

    def _unary(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=min(self._timeout_s, 30.0))
        except grpc.RpcError as exc:
            raise self._typed(exc) from exc

    def _typed(self, error: grpc.RpcError) -> ExpertMeshError:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return Refused(details)
        if code == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details.lower():
            return ERROR_BY_CODE["UNAVAILABLE"](
                f"nobody answers at {self.address}; start a server with `expertmesh serve`, or name it with --server"
            )
        kind = ERROR_BY_CODE.get(code.name)
        return kind(details) if kind is not None else InternalError(f"{code.name}: {details}")


def text_request(prompt: str | None, ids: str | None, **fields: Any) -> inference_pb2.GenerateRequest:
    """A request from command-line arguments; ``ids`` are numbers with commas between them.

    Raises:
        ConfigError: neither or both are given, or something is no number or not UTF-8.
    """
    if (prompt is None) == (ids is None):
        raise ConfigError("PROMPT: exactly one of PROMPT and --ids must be given")
    request = inference_pb2.GenerateRequest()
    for name, value in fields.items():
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        try:
            if isinstance(value, list):
                getattr(request, name).extend(value)
            else:
                setattr(request, name, value)
        except (ValueError, TypeError, UnicodeEncodeError) as exc:
            limit = "must be from 0 to 2**64 - 1" if name == "seed" else "does not fit its type, or is not UTF-8"
            raise ConfigError(f"{flag}: got {ascii(value)[:60]}; {limit}") from exc
    if prompt is not None:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise ConfigError(f"PROMPT: got {ascii(prompt)[:60]}; must be UTF-8") from exc
        request.prompt = prompt
        return request
    assert ids is not None
    try:
        request.prompt_ids.ids.extend(int(part) for part in ids.split(",") if part.strip())
    except ValueError as exc:
        raise ConfigError(f"--ids: got {ids[:60]!r}; must be token ids from 0 up with commas between them") from exc
    request.prompt_ids.SetInParent()
    return request
