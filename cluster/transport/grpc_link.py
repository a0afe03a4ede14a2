"""The gRPC transport, router's side: one bidirectional stream to a group, calls multiplexed by id."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator

import grpc

from cluster.core import Deadline, GroupId, LayerCall
from cluster.errors import DeadlineExceeded, ExpertMeshError, InternalError, LinkBroken, LinkRefused
from cluster.rpc.v1 import experts_pb2, experts_pb2_grpc
from cluster.transport.base import LayerRows, PendingReply
from cluster.transport.codec import MAX_MESSAGE_BYTES, PROTOCOL_VERSION, decode_reply, encode_call

log = logging.getLogger(__name__)

CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class GrpcTransport:
    """A link over the network. The constructor returns after the handshake.

    Raises (constructor):
        LinkRefused: the group serves another model or dtype, or has another cluster secret.
        LinkBroken: nobody answers at ``address`` before ``deadline``.
    """

    kind = "grpc"

    def __init__(
        self, group: GroupId, address: str, hello: experts_pb2.Hello, deadline: Deadline, router: str = "router"
    ) -> None:
        self.group, self.address = group, address
        self._outbox: queue.SimpleQueue[experts_pb2.ToGroup | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[PendingReply, int, int]] = {}
        self._broken: ExpertMeshError | None = None
        self._welcomed = threading.Event()
        self.incarnation = ""
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        hello.protocol, hello.router = PROTOCOL_VERSION, router
        self._outbox.put(experts_pb2.ToGroup(hello=hello))
        self._stream = experts_pb2_grpc.ExpertsStub(self._channel).LayerCalls(self._requests())
        self._reader = threading.Thread(target=self._read, name=f"grpc-link-{group}", daemon=True)
        self._reader.start()
        if not self._welcomed.wait(deadline.remaining_s()):
            self.close()
            raise LinkBroken(f"group {group} at {address} did not answer the handshake in time")
        if self._broken is not None:
            self.close()
            raise self._broken

    def _requests(self) -> Iterator[experts_pb2.ToGroup]:
        while (message := self._outbox.get()) is not None:
            yield message

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """See `Transport`."""
        pending = PendingReply(self.group, call)
        num_tokens, hidden_size = rows.hidden_TH.shape
        message = experts_pb2.ToGroup(call=encode_call(call, rows))
        with self._lock:
            if self._broken is not None:
                raise LinkBroken(str(self._broken))
            self._waiting[call.call_id] = (pending, num_tokens, hidden_size)
            self._outbox.put(message)
        return pending

    def cancel(self, pending: PendingReply) -> None:
        """See `Transport`."""
        with self._lock:
            known = self._waiting.pop(pending.call.call_id, None)
            if known is not None and self._broken is None:
                self._outbox.put(experts_pb2.ToGroup(cancel_call_id=pending.call.call_id))
        pending.fail(DeadlineExceeded(f"call {pending.call.call_id} to group {self.group} was cancelled"))

    def healthy(self) -> bool:
        """See `Transport`."""
        return self._broken is None

    def close(self) -> None:
        """See `Transport`."""
        self._break(LinkBroken(f"link to group {self.group} was closed"))
        self._stream.cancel()
        self._channel.close()

    def _break(self, error: ExpertMeshError) -> None:
        with self._lock:
            if self._broken is None:
                self._broken = error
            waiting, self._waiting = self._waiting, {}
            self._outbox.put(None)
        self._welcomed.set()
        for pending, _, _ in waiting.values():
            pending.fail(LinkBroken(str(error)))

    def _read(self) -> None:
        try:
            for message in self._stream:
                kind = message.WhichOneof("message")
                if kind == "welcome":
                    self.incarnation = message.welcome.incarnation
                    self._welcomed.set()
                elif kind == "reply":
                    self._deliver(message.reply)
            self._break(LinkBroken(f"group {self.group} at {self.address} ended the link"))
        except grpc.RpcError as exc:
            code, details = exc.code(), exc.details()
            if code == grpc.StatusCode.PERMISSION_DENIED:
                self._break(LinkRefused(f"group {self.group} at {self.address} refused the link: {details}"))
            else:
                self._break(LinkBroken(f"link to group {self.group} at {self.address} broke ({code.name}): {details}"))

    def _deliver(self, message: experts_pb2.LayerReplyMessage) -> None:
        with self._lock:
            known = self._waiting.pop(message.call_id, None)
        if known is None:
            return  # cancelled, or answered twice
        pending, num_tokens, hidden_size = known
        try:
            pending.resolve(decode_reply(message, self.group, pending.call.layer, num_tokens, hidden_size))
        except ExpertMeshError as exc:
            pending.fail(exc)
        except (ValueError, RuntimeError) as exc:
            log.exception("reply of group %d cannot be decoded", self.group)
            pending.fail(InternalError(f"reply of group {self.group} cannot be decoded: {exc}"))
