"""The gRPC transport, router's side: one bidirectional stream to a group, calls multiplexed by id.

With ``payload`` "gloo" or "nccl" the stream carries headers and pairs, and the rows go by process groups.
"""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from typing import Any

import grpc
import torch

from cluster.core import Deadline, GroupId, LayerCall, Order
from cluster.errors import ConfigError, DeadlineExceeded, ExpertMeshError, LinkBroken, LinkRefused
from cluster.rpc.v1 import links_pb2
from cluster.settings import SecurityConfig
from cluster.transport.base import LayerReply, LayerRows, PendingReply
from cluster.transport.codec import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Kind,
    Placement,
    encode_announced_call,
    encode_call,
    encode_cancel,
    encode_order,
)
from cluster.transport.collective import ROUTER_RANK, PayloadPair, connect_store, own_interface
from cluster.transport.credentials import link_channel
from cluster.transport.handshake import decode_welcome, encode_hello
from cluster.transport.orders import WaitingOrders
from cluster.transport.replies import (
    decode_reply_head,
    decode_times,
    good_inline_reply,
    good_reply,
    raise_for_status,
    reply_rows,
)

log = logging.getLogger(__name__)

SERVICE, METHOD = "cluster.rpc.v1.Experts", "LayerCalls"
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


_REPLY = int(Kind.REPLY)
_TAKEN = object()
"""What gRPC makes of a reply that has been delivered."""
Parsed = bytes | ExpertMeshError | object


class _ShapedReply(PendingReply):
    """Knows the rows of its call."""

    __slots__ = ("shape",)

    def __init__(self, group: GroupId, call: LayerCall, shape: tuple[int, int]) -> None:
        super().__init__(group, call)
        self.shape = shape


class GrpcTransport:
    """A link over the network. The constructor returns after the handshake.

    Raises (constructor):
        LinkRefused: the group serves another model or dtype, or has another cluster secret.
        LinkBroken: nobody answers at ``address`` before ``deadline``, or process groups cannot be made.
    """

    def __init__(
        self,
        group: GroupId,
        address: str,
        hello: links_pb2.Hello,
        deadline: Deadline,
        payload: str = "",
        payload_timeout_s: float = 10.0,
        device: torch.device | None = None,
        security: SecurityConfig | None = None,
    ) -> None:
        self.group, self.address, self.kind = group, address, payload or "grpc"
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._order = threading.Lock()
        self._orders = WaitingOrders()
        self._waiting: dict[int, _ShapedReply] = {}
        self._broken: ExpertMeshError | None = None
        self._welcomed = threading.Event()
        self.welcome = links_pb2.Welcome()
        self._payload: PayloadPair | None = None
        greeting = links_pb2.Hello()
        greeting.CopyFrom(hello)
        greeting.protocol, greeting.payload = PROTOCOL_VERSION, payload
        greeting.generation = uuid.uuid4().hex if payload else ""
        try:
            self._channel = link_channel(address, security or SecurityConfig(), CHANNEL_OPTIONS)
        except ConfigError as exc:  # files that are being replaced: the next attempt may find them
            raise LinkBroken(f"group {group} at {address}: {exc}") from exc
        self._outbox.put(encode_hello(greeting))
        call: Any = self._channel.stream_stream(f"/{SERVICE}/{METHOD}", response_deserializer=self._parse)
        self._stream = call(iter(self._outbox.get, None))
        self._reader = threading.Thread(target=self._read, name=f"{self.kind}-link-{group}", daemon=True)
        self._reader.start()
        try:
            if not self._welcomed.wait(deadline.remaining_s()):
                raise LinkBroken(f"group {group} at {address} did not answer the handshake in time")
            if self._broken is not None:
                raise self._broken
            if payload:
                own = torch.device("cpu") if device is None else device
                self._payload = self._join(payload, greeting.generation, deadline, payload_timeout_s, own)
        except BaseException:
            self.close()
            raise

    def _join(
        self, payload: str, generation: str, deadline: Deadline, timeout_s: float, device: torch.device
    ) -> PayloadPair:
        try:
            store = connect_store(self.welcome.store, deadline.remaining_s())
        except RuntimeError as exc:
            raise LinkBroken(f"group {self.group}: no store at {self.welcome.store!r}: {exc}") from exc
        interface = own_interface(self.welcome.store)
        return PayloadPair(payload, store, generation, ROUTER_RANK, timeout_s, device, interface, self._break)

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """See `Transport`."""
        num_tokens, hidden_size = rows.hidden_TH.shape
        pending = _ShapedReply(self.group, call, (num_tokens, hidden_size))
        # Setting and popping are atomic, and whoever breaks the link says so before it looks at who waits.
        self._waiting[call.call_id] = pending
        if self._broken is not None:
            self._waiting.pop(call.call_id, None)
            raise LinkBroken(str(self._broken))
        if self._payload is None:
            self._outbox.put(encode_call(call, rows, self._orders.take(call)))
        else:
            frame = self._orders.take(call) + encode_announced_call(call, rows)
            with self._order:  # payloads go in the order of their announcements
                self._outbox.put(frame)
                self._payload.send(rows.hidden_TH)
        return pending

    def cancel(self, pending: PendingReply) -> None:
        """See `Transport`. The call stays known until the group answers, which it does in any case: an announced answer
        that is under way must still be received."""
        call_id = pending.call.call_id
        pending.fail(DeadlineExceeded(f"call {call_id} to group {self.group} was cancelled"))
        if self._waiting.get(call_id) is pending and self._broken is None:
            self._outbox.put(encode_cancel(call_id))

    def order(self, order: Order, at_once: bool = False) -> None:
        """See `Transport`."""
        if not at_once:
            self._orders.add(order)
        elif self._broken is None:
            self._outbox.put(encode_order(order))

    def healthy(self) -> bool:
        """See `Transport`."""
        return self._broken is None

    def close(self) -> None:
        """See `Transport`."""
        self._break(LinkBroken(f"link to group {self.group} was closed"))
        self._channel.close()

    def _break(self, error: ExpertMeshError) -> None:
        if self._broken is None:
            self._broken = error
        waiting = list(self._waiting.values())
        self._outbox.put(None)
        self._welcomed.set()
        self._stream.cancel()
        if self._payload is not None:
            self._payload.close()
        for pending in waiting:
            pending.fail(LinkBroken(str(error)))

    def _parse(self, frame: bytes) -> Parsed:
        """Delivers a reply where gRPC makes messages out of bytes, in the thread that received them: one hand-over less
        than behind the stream's iterator. A payload must be waited for, which that thread must not do. The iterator
        gets what is left to do."""
        if self.kind != "grpc" or not frame or frame[0] != _REPLY:
            return frame
        try:
            self._deliver(frame)
        except ExpertMeshError as exc:
            return exc
        return _TAKEN

    def _read(self) -> None:
        try:
            for frame in self._stream:
                if frame is _TAKEN:
                    continue
                if isinstance(frame, ExpertMeshError):
                    raise frame
                if frame and frame[0] == _REPLY:
                    self._deliver(frame)
                elif not self._welcomed.is_set() and (welcome := decode_welcome(frame)) is not None:
                    self.welcome = welcome
                    self._welcomed.set()
                else:
                    raise LinkBroken(f"group {self.group} at {self.address} sent what is no reply")
            self._break(LinkBroken(f"group {self.group} at {self.address} ended the link"))
        except grpc.RpcError as exc:
            code, details = exc.code(), exc.details()
            if code == grpc.StatusCode.PERMISSION_DENIED:
                self._break(LinkRefused(f"group {self.group} at {self.address} refused the link: {details}"))
            else:
                self._break(LinkBroken(f"link to group {self.group} at {self.address} broke ({code.name}): {details}"))
        except ExpertMeshError as exc:
            self._break(exc)
        except Exception as exc:
            log.exception("reading the link to group %d failed", self.group)
            self._break(LinkBroken(f"link to group {self.group} failed: {type(exc).__name__}"))

    def _deliver(self, frame: bytes) -> None:
        """Hands a reply to whoever waits.

        Raises:
            ExpertMeshError: the frame, or the payload that it announces, cannot be had: the link is of no use any more.
        """
        call_id, queue_s, compute_s, _, load_s, load_bytes, expert = decode_times(frame)
        said = (queue_s, compute_s, load_s, expert, load_bytes)
        pending = self._waiting.pop(call_id, None)
        if pending is None:
            return  # answered twice
        shape = pending.shape
        try:
            if frame.startswith(good_inline_reply(shape)):
                pending.resolve(LayerReply(reply_rows(frame, shape), *said))
            elif frame.startswith(good_reply(shape, Placement.ANNOUNCED)) and self._payload is not None:
                pending.resolve(LayerReply(self._payload.receive(torch.float32, shape), *said))
            else:
                raise_for_status(decode_reply_head(frame), frame, self.group, pending.call.layer, shape)
                raise LinkBroken(f"group {self.group} announced a payload on a link without process groups")
        except LinkBroken as exc:
            pending.fail(exc)
            raise
        except ExpertMeshError as exc:
            pending.fail(exc)
