"""One router's gRPC stream of layer calls, in a group: who reads it, who computes its calls, who sends the answers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cluster.core import GroupId, LayerCall
from cluster.errors import ExpertMeshError, LinkBroken
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
from cluster.transport.collective import PayloadPair
from cluster.transport.replies import encode_error, encode_reply, reply_header

log = logging.getLogger(__name__)

_TAKEN, _WORK = object(), object()
"""What gRPC makes of a frame that needs nothing more, and of a call that who reads the stream computes."""
READ = object()
"""In a stream's outbox: somebody else reads frames now."""
Parsed = bytes | ExpertMeshError | object
Send = Callable[[bytes | None], object]
_CALL, _CANCEL, _ORDER = int(Kind.CALL), int(Kind.CANCEL), int(Kind.ORDER)


class RouterStream:
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
        self.outbox.put(READ)
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
            if frame is not READ:
                self._send(frame)
            else:
                read()
        self.outbox.put(None)  # for the other thread
        self._send(None)

    def _lend(self) -> None:
        self._lent = True

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

    def __init__(self, stream: RouterStream, call: LayerCall) -> None:
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
