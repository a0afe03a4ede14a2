"""The data plane of a group on the network: the gRPC stream of layer calls in front of an `ExpertHost`."""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import torch

from cluster.core import GroupId, LayerCall
from cluster.errors import ConfigError, ExpertMeshError, LinkBroken
from cluster.experts.identity import Identity
from cluster.rpc.v1 import links_pb2
from cluster.settings import SecurityConfig
from cluster.transport.base import CallHandler, LayerReply, LayerRows, PendingReply
from cluster.transport.codec import (
    FORM_BYTES,
    Kind,
    Placement,
    call_id_of,
    decode_announced,
    decode_call,
    decode_call_id,
    decode_form,
    decode_ids,
    decode_order,
)
from cluster.transport.collective import GROUP_RANK, PayloadPair, Store, available
from cluster.transport.credentials import link_server
from cluster.transport.grpc_link import CHANNEL_OPTIONS, METHOD, SERVICE
from cluster.transport.handshake import decode_hello, encode_welcome
from cluster.transport.replies import (
    encode_error,
    encode_reply,
    reply_header,
)

log = logging.getLogger(__name__)

_TAKEN, _WORK = object(), object()
"""What gRPC makes of a frame that needs nothing more, and of a call that who reads the stream computes."""
_READ = object()
"""In a stream's outbox: somebody else reads frames now."""
Parsed = bytes | ExpertMeshError | object
Send = Callable[[bytes | None], object]
_CALL, _CANCEL, _ORDER = int(Kind.CALL), int(Kind.CANCEL), int(Kind.ORDER)
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


class _Stream:
    """One router's stream: frames that wait to be sent, calls in flight, and its process groups if it has any.

    Two threads serve it. One waits for frames, and so has nothing to do when a call comes: it computes decode calls
    that find the group idle, and sends their answers. Meanwhile the other one, which sends what others leave in the
    outbox, waits for frames in its place.
    """

    def __init__(self, group: GroupId, handler: CallHandler) -> None:
        self.group, self._handler = group, handler
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.calls: dict[int, PendingReply] = {}
        self._order = threading.Lock()
        self.payload: PayloadPair | None = None
        self.calls_inline = self._lends = self._lent = False
        self._computed: dict[int, list[bytes]] = {}  # answers of calls that a thread of the stream computes, by thread
        self._sending = threading.Lock()
        self._send: Send = self.outbox.put

    def read(self, frames: Iterator[Parsed]) -> bool:
        """Takes frames in the calling thread until they end; False if another thread reads on.

        Raises:
            LinkBroken, InvalidArgument: see `take`.
            grpc.RpcError, Exception: the stream broke.
        """
        for frame in frames:
            if frame is _WORK:
                self._compute()
                return False
            if isinstance(frame, bytes):
                self.take(frame)
            elif isinstance(frame, ExpertMeshError):
                raise frame
        return True

    def _compute(self) -> None:
        self.outbox.put(_READ)
        thread = threading.get_ident()
        frames = self._computed[thread] = []
        try:
            self._handler.work()
        finally:
            del self._computed[thread]
        for frame in frames:  # now that others may compute
            self._send(frame)

    def send_with(self, send: Send, is_active: Callable[[], bool]) -> None:
        """From now on ``send`` is called, by one thread at a time; it may wait for the router. None ends the stream, if
        it ``is_active`` still."""

        def send_in_turn(frame: bytes | None) -> None:
            with self._sending:
                if frame is not None or is_active():
                    send(frame)

        self._send, self._lends = send_in_turn, self.calls_inline  # what has a payload is not taken while it is parsed

    def work(self, read: Callable[[], object]) -> None:
        """Sends what waits, until the end; ``read``, when it is this thread's turn, takes frames until another
        thread reads on, or they end and it has called `end`. For both threads."""
        while (frame := self.outbox.get()) is not None:
            if frame is not _READ:
                self._send(frame)
            else:
                read()
        self.outbox.put(None)  # for the other thread
        self._send(None)

    def _lend(self) -> bool:
        self._lent = True
        return True

    def end(self, error: LinkBroken | None = None) -> None:
        """The stream's sender stops."""
        if error is not None:
            log.warning("link ended: %s", error)
        self.outbox.put(None)

    def close(self) -> None:
        """Calls in flight are not computed any more."""
        for pending in list(self.calls.values()):
            self._handler.cancel(pending)
        if self.payload is not None:
            self.payload.close()

    def answer(self, call_id: int, reply: LayerReply) -> None:
        """Sends an answer: behind its header, or announced and then by the process group."""
        if self.payload is None:
            frame = encode_reply(call_id, reply)
            mine = self._computed.get(threading.get_ident())
            if mine is None:
                self.outbox.put(frame)
            else:
                mine.append(frame)
            return
        with self._order:
            self.outbox.put(reply_header(call_id, reply, Placement.ANNOUNCED))
            self.payload.send(reply.partial_TH)

    def parse(self, frame: bytes) -> Parsed:
        """Takes a call where gRPC makes messages out of bytes, in the thread that received them: one hand-over less
        than behind the stream's iterator. A payload must be waited for, which that thread must not do. The iterator
        gets what is left to do."""
        if not self.calls_inline:
            return frame
        self._lent = False
        try:
            self.take(frame)
        except ExpertMeshError as exc:
            return exc
        return _WORK if self._lent else _TAKEN

    def take(self, frame: bytes | memoryview) -> None:
        """One frame of the router.

        Raises:
            LinkBroken: the payload that it announces did not come.
            InvalidArgument: it is neither call nor cancellation, or so damaged that not even its id is known.
        """
        while frame and frame[0] == _ORDER:
            order, frame = decode_order(frame)
            self._handler.order(order)
            if not frame:
                return
        kind = frame[0] if frame else 0
        if kind == _CANCEL:
            cancelled = self.calls.get(decode_call_id(frame))
            if cancelled is not None:
                self._handler.cancel(cancelled)
            return
        if kind != _CALL:
            raise LinkBroken("a frame that is neither a call nor a cancellation")
        try:
            if self.payload is None:
                call, rows = decode_call(frame)
            else:
                form = decode_form(bytes(frame[:FORM_BYTES]))
                call, num_pairs = decode_ids(frame)
                hidden_TH = self.payload.receive(form.dtype, (form.num_tokens, form.hidden_size))
                rows = LayerRows(hidden_TH, decode_announced(frame, num_pairs))
        except LinkBroken:
            raise
        except ExpertMeshError as exc:
            call_id = call_id_of(frame)
            if not call_id:
                raise
            self.outbox.put(encode_error(call_id, exc))
            return
        pending = _StreamReply(self, call)
        self.calls[call.call_id] = pending
        self._handler.submit(call, rows, pending, self._lend if self._lends else None)


class _StreamReply(PendingReply):
    """Goes to the stream as soon as it is there. Nobody waits for it, so taking it from the stream's calls is all that
    decides who answers first."""

    __slots__ = ("_stream",)

    def __init__(self, stream: _Stream, call: LayerCall) -> None:
        self._stream, self.call = stream, call

    def done(self) -> bool:
        return self.call.call_id not in self._stream.calls

    def resolve(self, reply: LayerReply, answered_s: float | None = None) -> bool:
        if self._stream.calls.pop(self.call.call_id, None) is None:
            return False
        self._stream.answer(self.call.call_id, reply)
        return True

    def fail(self, error: ExpertMeshError) -> bool:
        if self._stream.calls.pop(self.call.call_id, None) is None:
            return False
        self._stream.outbox.put(encode_error(self.call.call_id, error))
        return True


class _Calls:
    """Handshake, then calls to the handler and its answers back."""

    def __init__(self, identity: Identity, handler: CallHandler, offers: Offers, bind: str, host_address: str) -> None:
        self._identity, self._handler, self._offers = identity, handler, offers
        self._bind, self._host_address = bind, host_address
        self._store_lock = threading.Lock()
        self._store: Store | None = None
        self.streams: set[grpc.ServicerContext] = set()
        self.refused = 0

    def new_stream(self) -> _Stream:
        """For a router that is about to say hello."""
        return _Stream(self._identity.group, self._handler)

    def serve(
        self, stream: _Stream, frames: Iterator[Parsed], context: grpc.ServicerContext, send: Send | None = None
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
            stream.outbox.put(_READ)
            threading.Thread(target=stream.work, args=(read,), name="layer-calls", daemon=True).start()
            stream.work(read)
        finally:
            stream.end()
            self._forget(stream, context)
        return iter(())

    def _read_alone(self, read: Callable[[], bool], stream: _Stream, context: grpc.ServicerContext) -> None:
        try:
            read()
        finally:
            self._forget(stream, context)

    def _forget(self, stream: _Stream, context: grpc.ServicerContext) -> None:
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

    def _read(self, frames: Iterator[Parsed], hello: links_pb2.Hello, stream: _Stream) -> bool:
        """See `_Stream.work`."""
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
