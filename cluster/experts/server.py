"""The data-plane server of a group: the gRPC stream of layer calls in front of an `ExpertHost`."""

from __future__ import annotations

import hmac
import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from cluster.core import GroupId, LayerCall
from cluster.errors import ConfigError, ExpertMeshError
from cluster.rpc.v1 import experts_pb2, experts_pb2_grpc
from cluster.transport.base import CallHandler, LayerReply, PendingReply
from cluster.transport.codec import PROTOCOL_VERSION, decode_call, encode_error, encode_reply
from cluster.transport.grpc_link import CHANNEL_OPTIONS

log = logging.getLogger(__name__)

ALL_INTERFACES = ("0.0.0.0", "[::]")
HANDSHAKE_TIMEOUT_S = 5.0
MAX_ROUTERS = 64
"""Each stream holds one thread of the server."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a router must know to be let in, and what it is told."""

    group: GroupId
    incarnation: str
    fingerprint: str
    dtype: str
    secret: str


class _StreamReply(PendingReply):
    """Puts the answer on the stream's outbox as soon as it is there."""

    def __init__(
        self, group: GroupId, call: LayerCall, outbox: queue.SimpleQueue[experts_pb2.FromGroup | None]
    ) -> None:
        super().__init__(group, call)
        self._outbox = outbox

    def resolve(self, reply: LayerReply) -> bool:
        first = super().resolve(reply)
        if first:
            self._outbox.put(experts_pb2.FromGroup(reply=encode_reply(self.call.call_id, reply)))
        return first

    def fail(self, error: ExpertMeshError) -> bool:
        first = super().fail(error)
        if first:
            self._outbox.put(experts_pb2.FromGroup(reply=encode_error(self.call.call_id, error)))
        return first


class ExpertsServicer(experts_pb2_grpc.ExpertsServicer):
    """Handshake, then calls to the handler and its answers back."""

    def __init__(self, identity: Identity, handler: CallHandler) -> None:
        self._identity, self._handler = identity, handler

    def LayerCalls(
        self, request_iterator: Iterator[experts_pb2.ToGroup], context: grpc.ServicerContext
    ) -> Iterator[experts_pb2.FromGroup]:
        impatience = threading.Timer(HANDSHAKE_TIMEOUT_S, context.cancel)
        impatience.start()
        first = next(request_iterator, None)
        impatience.cancel()
        problem = self._refusal(first)
        if problem:
            log.warning("link refused: %s", problem)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
        outbox: queue.SimpleQueue[experts_pb2.FromGroup | None] = queue.SimpleQueue()
        calls: dict[int, PendingReply] = {}
        context.add_callback(lambda: outbox.put(None))
        reader = threading.Thread(
            target=self._read, args=(request_iterator, outbox, calls), name="layer-calls", daemon=True
        )
        welcome = experts_pb2.Welcome(group=self._identity.group, incarnation=self._identity.incarnation)
        yield experts_pb2.FromGroup(welcome=welcome)
        reader.start()
        while (message := outbox.get()) is not None:
            calls.pop(message.reply.call_id, None)
            yield message
        for pending in list(calls.values()):
            self._handler.cancel(pending)

    def _refusal(self, first: experts_pb2.ToGroup | None) -> str:
        mine = self._identity
        if first is None or first.WhichOneof("message") != "hello":
            return "the first message must be the handshake"
        hello = first.hello
        if not hmac.compare_digest(hello.secret.encode(), mine.secret.encode()):
            return "the cluster secret differs"
        if hello.protocol != PROTOCOL_VERSION:
            return f"protocol version {hello.protocol} differs from {PROTOCOL_VERSION}"
        if hello.fingerprint != mine.fingerprint:
            return f"model {hello.fingerprint} differs from {mine.fingerprint}"
        if hello.dtype != mine.dtype:
            return f"dtype {hello.dtype} differs from {mine.dtype}"
        return ""

    def _read(
        self,
        requests: Iterator[experts_pb2.ToGroup],
        outbox: queue.SimpleQueue[experts_pb2.FromGroup | None],
        calls: dict[int, PendingReply],
    ) -> None:
        try:
            for message in requests:
                kind = message.WhichOneof("message")
                if kind == "cancel_call_id":
                    cancelled = calls.pop(message.cancel_call_id, None)
                    if cancelled is not None:
                        self._handler.cancel(cancelled)
                elif kind == "call":
                    self._take(message.call, outbox, calls)
        except grpc.RpcError:
            log.debug("link ended by the router")
        except Exception:  # grpc raises a bare Exception when the stream is cancelled while it is being read
            log.debug("link ended while it was read", exc_info=True)
        finally:
            outbox.put(None)

    def _take(
        self,
        message: experts_pb2.LayerCallMessage,
        outbox: queue.SimpleQueue[experts_pb2.FromGroup | None],
        calls: dict[int, PendingReply],
    ) -> None:
        try:
            call, rows = decode_call(message)
        except ExpertMeshError as exc:
            outbox.put(experts_pb2.FromGroup(reply=encode_error(message.call_id, exc)))
            return
        pending = _StreamReply(self._identity.group, call, outbox)
        calls[call.call_id] = pending
        self._handler.submit(call, rows, pending)


class DataPlaneServer:
    """A gRPC server on ``bind`` (any free port) for one group. ``address`` is where routers connect: ``bind``, or
    ``host_address`` when that is all interfaces.

    Raises (constructor):
        ConfigError: the interface cannot be bound.
    """

    def __init__(self, identity: Identity, handler: CallHandler, bind: str, host_address: str) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=MAX_ROUTERS, thread_name_prefix="data-plane"),
            options=(
                *CHANNEL_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ),
        )
        experts_pb2_grpc.add_ExpertsServicer_to_server(ExpertsServicer(identity, handler), self._server)
        try:
            port = self._server.add_insecure_port(f"{bind}:0")
        except RuntimeError as exc:
            raise ConfigError(f"data_plane.bind: cannot listen on {bind!r}: {exc}") from exc
        self.address = f"{host_address if bind in ALL_INTERFACES else bind}:{port}"
        self._server.start()

    def close(self, grace_s: float = 0.5) -> None:
        """Ends all links."""
        self._server.stop(grace_s).wait(grace_s + 5)
