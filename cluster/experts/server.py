"""The data plane of a group on the network: the gRPC stream of layer calls in front of an `ExpertHost`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from cluster.errors import ConfigError, ExpertMeshError
from cluster.experts.identity import Identity
from cluster.experts.stream import READ, Parsed, RouterStream, Send
from cluster.rpc.v1 import links_pb2
from cluster.settings import SecurityConfig
from cluster.transport.base import CallHandler
from cluster.transport.collective import GROUP_RANK, PayloadPair, Store, available
from cluster.transport.credentials import link_server
from cluster.transport.grpc_link import CHANNEL_OPTIONS, METHOD, SERVICE
from cluster.transport.handshake import decode_hello, encode_welcome

log = logging.getLogger(__name__)

_NON_BLOCKING = "experimental_non_blocking"
ALL_INTERFACES = ("0.0.0.0", "[::]")
HANDSHAKE_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 1024
MAX_STREAMS = 128
"""Each stream holds one thread of the server; a router has one or two."""


@dataclass(frozen=True, slots=True)
class Offers:
    """Other ways to this group, as routers are told."""

    shm_socket: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gpu: str = ""
    payload_timeout_s: float = 10.0
    collectives: tuple[str, ...] = field(default_factory=lambda: tuple(available()))
    """Process groups that it makes."""


class _Calls:
    """Handshake, then calls to the handler and its answers back."""

    def __init__(self, identity: Identity, handler: CallHandler, offers: Offers, bind: str, host_address: str) -> None:
        self._identity, self._handler, self._offers = identity, handler, offers
        self._bind, self._host_address = bind, host_address
        self._store_lock = threading.Lock()
        self._store: Store | None = None
        self.streams: set[grpc.ServicerContext] = set()
        self.refused = 0

    def new_stream(self) -> RouterStream:
        """For a router that is about to say hello."""
        return RouterStream(self._identity.group, self._handler)

    def serve(
        self, stream: RouterStream, frames: Iterator[Parsed], context: grpc.ServicerContext, send: Send | None = None
    ) -> Iterator[bytes]:
        """The method's handler; runs in a thread of the server for as long as the stream lives. gRPC gives ``send`` to
        handlers that are marked as `_NON_BLOCKING`; one that does not know the mark sends what this returns."""
        impatience = threading.Timer(HANDSHAKE_TIMEOUT_S, context.cancel)
        impatience.start()
        first = next(frames, b"")
        impatience.cancel()
        hello = decode_hello(first) if isinstance(first, bytes) else None
        problem = self._identity.refusal(hello)
        if hello is not None and not problem and hello.payload and hello.payload not in self._offers.collectives:
            problem = f"this group has no {hello.payload}"
        if problem or hello is None:
            self.refused += 1
            log.warning("link refused: %s", problem)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
            return iter(())
        stream.calls_inline = not hello.payload
        context.add_callback(stream.end)
        self.streams.add(context)
        read = functools.partial(self._read, frames, hello, stream)
        if send is None:
            reader = threading.Thread(target=self._read_alone, args=(read, stream, context), name="layer-calls")
            reader.daemon = True
            reader.start()
            stream.outbox.put(encode_welcome(self._welcome(hello)))
            return iter(stream.outbox.get, None)
        try:
            stream.send_with(send, context.is_active)
            stream.outbox.put(encode_welcome(self._welcome(hello)))
            stream.outbox.put(READ)
            threading.Thread(target=stream.work, args=(read,), name="layer-calls", daemon=True).start()
            stream.work(read)
        finally:
            stream.end()
            self._forget(stream, context)
        return iter(())

    def _read_alone(self, read: Callable[[], bool], stream: RouterStream, context: grpc.ServicerContext) -> None:
        try:
            read()
        finally:
            self._forget(stream, context)

    def _forget(self, stream: RouterStream, context: grpc.ServicerContext) -> None:
        self.streams.discard(context)
        stream.close()

    def _welcome(self, hello: links_pb2.Hello) -> links_pb2.Welcome:
        welcome = links_pb2.Welcome(
            group=self._identity.group,
            incarnation=self._identity.incarnation,
            shm_socket=self._offers.shm_socket,
            device=self._offers.device.type,
            gpu=self._offers.gpu,
            collectives=self._offers.collectives,
        )
        if hello.payload:
            with self._store_lock:
                if self._store is None:
                    self._store = Store(self._bind.strip("[]"), self._host_address, self._offers.payload_timeout_s)
            welcome.store = self._store.address
        return welcome

    def _read(self, frames: Iterator[Parsed], hello: links_pb2.Hello, stream: RouterStream) -> bool:
        """See `RouterStream.work`."""
        try:
            if hello.payload:
                assert self._store is not None
                stream.payload = PayloadPair(
                    hello.payload,
                    self._store.store,
                    hello.generation,
                    GROUP_RANK,
                    self._offers.payload_timeout_s,
                    self._offers.device,
                    self._host_address,
                    stream.end,
                )
            if not stream.read(frames):
                return False
        except ExpertMeshError as exc:
            log.warning("link ended: %s", exc)
        except grpc.RpcError:
            log.debug("link ended by the router")
        except Exception:  # grpc raises a bare Exception when the stream is cancelled while it is being read
            log.debug("link ended while it was read", exc_info=True)
        stream.end()
        return True


class _Streams(grpc.GenericRpcHandler):
    """Gives every stream its own way from bytes to calls."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See `grpc.GenericRpcHandler`."""
        if handler_call_details.method != f"/{SERVICE}/{METHOD}":
            return None
        stream = self._calls.new_stream()
        behavior: Any = functools.partial(self._calls.serve, stream)
        setattr(behavior, _NON_BLOCKING, True)
        return grpc.stream_stream_rpc_method_handler(behavior, request_deserializer=stream.parse)


class DataPlaneServer:
    """A gRPC server on ``bind`` (any free port) for one group. ``address`` is where routers connect: ``bind``, or
    ``host_address`` when that is all interfaces.

    Raises (constructor):
        ConfigError: the interface cannot be bound, or the certificates cannot be used.
    """

    def __init__(
        self,
        identity: Identity,
        handler: CallHandler,
        bind: str,
        host_address: str,
        offers: Offers | None = None,
        security: SecurityConfig | None = None,
    ) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(max_workers=MAX_STREAMS, thread_name_prefix="data-plane"),
            options=(
                *CHANNEL_OPTIONS,
                ("grpc.so_reuseport", 0),
                ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
                ("grpc.server_handshake_timeout_ms", int(1e3 * HANDSHAKE_TIMEOUT_S)),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ),
        )
        certificates = link_server(security or SecurityConfig())
        host = host_address if bind in ALL_INTERFACES else bind
        self._calls = _Calls(identity, handler, offers or Offers(), bind, host)
        self._server.add_generic_rpc_handlers((_Streams(self._calls),))
        try:
            # With TLS both ends show a certificate of the cluster's authorities.
            if certificates is None:
                port = self._server.add_insecure_port(f"{bind}:0")
            else:
                port = self._server.add_secure_port(f"{bind}:0", certificates.credentials())
        except RuntimeError as exc:
            raise ConfigError(f"data_plane.bind: cannot listen on {bind!r}: {exc}") from exc
        self.address = f"{host}:{port}"
        self._server.start()

    @property
    def refused(self) -> int:
        """Links whose handshake was not accepted."""
        return self._calls.refused

    def drop_links(self) -> None:
        """Ends all streams, as a fault would."""
        for context in list(self._calls.streams):
            context.cancel()

    def close(self, grace_s: float = 0.5) -> None:
        """Ends all links."""
        self._server.stop(grace_s).wait(grace_s + 5)
