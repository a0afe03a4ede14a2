"""A client of the gRPC API: typed errors instead of statuses, and with a tracer a trace for every request. Of several
routers it asks one that answers; a stream whose router dies goes on at another one, with the same tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import grpc

from cluster.api.client_tracing import ClientTracer
from cluster.api.resume import Resumable
from cluster.config import client_security
from cluster.errors import ERROR_BY_CODE, ConfigError, ExpertMeshError, InternalError
from cluster.rpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from cluster.settings import ClientSecurity
from cluster.transport.credentials import bearer, client_channel

DEFAULT_ADDRESS = "127.0.0.1:9000"


class Refused(ExpertMeshError):
    """The server found the request wrong; its message names field, value and limit."""

    code = "INVALID_ARGUMENT"


def _can_go_on(error: grpc.RpcError, begun: bool) -> bool:
    """Another router, or the same one later, may go on with the stream."""
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return begun  # where all streams of a dead router meet
    if error.code() == grpc.StatusCode.INTERNAL:  # Serve's ingress, when a router's process dies
        return any(name in (error.details() or "") for name in ("ActorDied", "RayActorError", "ActorUnavailable"))
    return bool(error.code() == grpc.StatusCode.UNAVAILABLE)


class _Door:
    """A channel to one router."""

    def __init__(self, address: str, security: ClientSecurity) -> None:
        options = (
            ("grpc.max_receive_message_length", -1),
            ("grpc.enable_http_proxy", 0),
            ("grpc.max_reconnect_backoff_ms", 1000),
        )
        self.channel = client_channel(address, security, options)
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)


class Client:
    """Channels to one router or to several, with commas between their addresses. Use as a context manager. With a
    ``tracer`` traces begin here.

    A stream whose router dies is asked for again, with the tokens that came, at the next router or, where there is only
    one, until that one is back; ``resume_s`` is how long that may take, 0 switches it off.

    ``security`` has token and certificates; by default they come from the environment (EXPERTMESH_CLIENT_CA and so on).

    Methods raise `ExpertMeshError`: Unavailable when nobody listens, Refused for bad input, and so on.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        timeout_s: float = 600.0,
        tracer: ClientTracer | None = None,
        resume_s: float = 30.0,
        security: ClientSecurity | None = None,
    ) -> None:
        self.address, self._timeout_s, self._resume_s = address, timeout_s, resume_s
        self._tracer = None if tracer is None or tracer.off else tracer
        security = client_security() if security is None else security
        self._token, self._tls = bearer(security), bool(security.ca)
        self._doors = [_Door(one.strip(), security) for one in address.split(",") if one.strip()]
        if not self._doors:
            raise ConfigError(f"--server: got {address!r}; must be HOST:PORT, or several with commas")
        self._at = 0
        self.resumed = 0
        """Streams that went on at another router, or at a new one in its place."""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for door in self._doors:
            door.channel.close()

    def generate(
        self, request: inference_pb2.GenerateRequest, trace_layers: bool = False
    ) -> Iterator[inference_pb2.GenerateChunk]:
        """Chunks as they come. Closing the iterator cancels the request. ``trace_layers`` asks the server for traces of
        single layers of its first steps."""
        trace = self._tracer.begin() if self._tracer is not None else None
        metadata = (*self._token, *(trace.metadata() if trace is not None else ()))
        if trace_layers:
            metadata = (*metadata, ("x-moe-trace-detail", "layer"))
        error = ""
        try:
            for chunk in self._whole(request, metadata):
                if trace is not None:
                    trace.got(len(chunk.tokens))
                yield chunk
                if trace is not None:
                    trace.asked()
        except grpc.RpcError as exc:
            error = exc.code().name
            raise self._typed(exc) from exc
        finally:
            if trace is not None:
                trace.end(error)

    def _whole(
        self, request: inference_pb2.GenerateRequest, metadata: tuple[tuple[str, str], ...]
    ) -> Iterator[inference_pb2.GenerateChunk]:
        """The chunks of one stream, whoever sends them."""
        until_s = time.monotonic() + self._timeout_s
        stream, tried = Resumable(request, self._resume_s), 0
        at = self._at
        while True:
            left_s = max(0.001, until_s - time.monotonic())
            call = self._doors[at].inference.Generate(stream.next_request(), timeout=left_s, metadata=metadata)
            try:
                for chunk in call:
                    if not (chunk.tokens or chunk.text or chunk.finish_reason):
                        continue  # Serve's ingress sends one before each error
                    if tried:
                        self.resumed += bool(stream.received)
                        tried = 0
                    stream.got(chunk)
                    yield chunk
                    if chunk.finish_reason:
                        return  # whatever comes of the rest of the call
                return
            except grpc.RpcError as exc:
                tried += 1
                if not self._resume_s or not _can_go_on(exc, begun=bool(stream.received)):
                    raise
                pause_s = stream.broke(tried_all=tried >= len(self._doors))
                if pause_s is None:
                    raise
                self._at = at = (at + 1) % len(self._doors)  # for the next stream, too
                time.sleep(min(pause_s, max(0.0, until_s - time.monotonic())))
            finally:
                call.cancel()

    def model_info(self) -> inference_pb2.ModelInfoReply:
        """What is served."""
        reply: inference_pb2.ModelInfoReply = self._unary("inference", "ModelInfo", inference_pb2.ModelInfoRequest())
        return reply

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._unary("inference", "Tokenize", inference_pb2.TokenizeRequest(text=text)).ids)

    def status(self) -> control_pb2.StatusReply:
        """How the system is."""
        reply: control_pb2.StatusReply = self._unary("control", "Status", control_pb2.StatusRequest())
        return reply

    def loads(self) -> control_pb2.LoadsReply:
        """How often each expert was wanted since the server's start."""
        reply: control_pb2.LoadsReply = self._unary("control", "Loads", control_pb2.LoadsRequest())
        return reply

    def change_placement(self, **change: Any) -> int:
        """Asks for one change (a field of ``ChangePlacementRequest``); the number of its receipt, 0 without one."""
        request = control_pb2.ChangePlacementRequest(**change)
        return int(self._unary("control", "ChangePlacement", request, doors=1).receipt)

    def placement(self) -> control_pb2.PlacementReply:
        """Changes of the placement, routers, and how placement is looked after."""
        reply: control_pb2.PlacementReply = self._unary("control", "Placement", control_pb2.PlacementRequest())
        return reply

    def set_tracing(self, on: bool) -> bool:
        """Switches the server's traces on or off; how they were before."""
        reply: control_pb2.SetTracingReply = self._unary("control", "SetTracing", control_pb2.SetTracingRequest(on=on))
        return reply.was_on

    def set_fail_over(self, on: bool) -> bool:
        """Switches fail-over and hedging of the router on or off; how it was before."""
        request = control_pb2.SetFailOverRequest(on=on)
        reply: control_pb2.SetFailOverReply = self._unary("control", "SetFailOver", request)
        return reply.was_on

    def _unary(self, service: str, method: str, request: Any, doors: int = 0) -> Any:
        """Asks so many routers at most, one after the other (0: all), until one answers."""
        most = doors or len(self._doors)
        for tried in range(1, most + 1):
            stub = getattr(self._doors[self._at], service)
            try:
                return getattr(stub, method)(request, timeout=min(self._timeout_s, 30.0), metadata=self._token)
            except grpc.RpcError as exc:
                if exc.code() != grpc.StatusCode.UNAVAILABLE or tried == most:
                    raise self._typed(exc) from exc
                self._at = (self._at + 1) % len(self._doors)
        raise AssertionError("unreachable")

    def _typed(self, error: grpc.RpcError) -> ExpertMeshError:
        code, details = error.code(), error.details() or ""
        if code == grpc.StatusCode.INVALID_ARGUMENT:
            return Refused(details)
        if code == grpc.StatusCode.UNAVAILABLE and (hint := self._why_not(details.lower())):
            return ERROR_BY_CODE["UNAVAILABLE"](hint)
        kind = ERROR_BY_CODE.get(code.name)
        return kind(details) if kind is not None else InternalError(f"{code.name}: {details}")

    def _why_not(self, details: str) -> str:
        """What a person can do about a connection that does not come about; empty where it is not about that."""
        ended = any(word in details for word in ("socket closed", "connection reset", "recvmsg"))
        if self._tls and (ended or any(word in details for word in ("ssl", "tls", "handshake", "certificate"))):
            return (
                f"{self.address} and this client do not agree on certificates, or it has just ended; see "
                "EXPERTMESH_CLIENT_CA, CERT, KEY and NAME, and whether it takes TLS"
            )
        if ended:
            return f"{self.address} ended the connection; if it wants TLS, set EXPERTMESH_CLIENT_CA"
        if "failed to connect" in details:
            return f"nobody answers at {self.address}; start a server with `expertmesh serve`, or name it with --server"
        return ""


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
