"""The shared-memory transport, group's side: a local socket that routers connect to, and one peer for each of them.

Handshakes have threads of their own; after them a peer's socket is read, and its answers are written, by the compute
thread of the `ExpertHost`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from cluster.core import LayerCall
from cluster.errors import ExpertMeshError, InternalError, InvalidArgument
from cluster.experts.host import ExpertHost
from cluster.experts.identity import Identity
from cluster.kernels.door import UNREAD, Answers, can_listen
from cluster.rpc.v1 import links_pb2
from cluster.transport.base import LayerReply, LayerRows, PendingReply
from cluster.transport.codec import (
    FORM_BYTES,
    PAIR_BYTES,
    Bytes,
    CallForm,
    Kind,
    Placement,
    call_id_of,
    decode_call_id,
    decode_form,
    decode_ids,
    decode_order,
    on_cpu,
    pairs_over,
    rows_over,
)
from cluster.transport.greeting import FRAME_BYTES, NONCE_BYTES
from cluster.transport.handshake import decode_hello, encode_welcome
from cluster.transport.mapped import SEALS, copy_out, map_memory
from cluster.transport.replies import ANSWERED_AT, REPLY_BYTES, encode_error, put_reply_header, reply_header
from cluster.transport.shm import MEMORY_BYTES

log = logging.getLogger(__name__)

_CALL, _CANCEL, _WAKE, _ORDER = int(Kind.CALL), int(Kind.CANCEL), int(Kind.WAKE), int(Kind.ORDER)
HANDSHAKE_TIMEOUT_S = 5.0
MAX_FORMS, MAX_COUNTS = 4096, 64
"""Forms of calls that are known, and of each the numbers of pairs."""
MAX_MOVED_BYTES = 1024 * 1024
"""Of an answer that is moved by who keeps the interpreter's lock meanwhile."""
MAX_HANDSHAKES = 16
"""Connections that are being checked at the same time; more wait in the socket's backlog."""


class ShmServer:
    """Listens on a socket in Linux's abstract namespace, which ends with the process. ``address`` is its name."""

    def __init__(self, identity: Identity, host: ExpertHost) -> None:
        self._identity, self._host = identity, host
        self.address = f"expertmesh-{uuid.uuid4().hex}"
        if host.served is not None:
            host.sockets.serve(host.served, reply_header(0, LayerReply(torch.empty((0, 0))), Placement.SHARED))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(b"\0" + self.address.encode())
        self._socket.listen(MAX_HANDSHAKES)
        self._slots = threading.BoundedSemaphore(MAX_HANDSHAKES)
        self._lock = threading.Lock()
        self._peers: set[_Peer] = set()
        self._closed = False
        self.refused = 0
        """Links whose handshake was not accepted."""
        self._thread = threading.Thread(target=self._accept, name="shm-accept", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            self._slots.acquire()
            try:
                connection, _ = self._socket.accept()
            except OSError:
                self._slots.release()
                if self._closed:
                    return
                log.exception("accepting a local connection failed")
                time.sleep(0.1)  # out of file descriptors, say: that passes or it does not, but not faster by trying
                continue
            threading.Thread(target=self._greet, args=(connection,), name="shm-handshake", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        fds: list[int] = []
        peer: _Peer | None = None
        try:
            connection.settimeout(HANDSHAKE_TIMEOUT_S)
            frame, fds, _, _ = socket.recv_fds(connection, FRAME_BYTES, 4)
            hello = decode_hello(frame)
            problem = self._identity.refusal(hello) or _memory_problem(fds, hello)
            if problem or hello is None:
                self.refused += 1
                log.warning("link refused: %s", problem)
                connection.send(problem.encode())
                connection.close()
                return
            memory = np.frombuffer(map_memory(fds[0], hello.memory_bytes), np.uint8)
            peer = _Peer(connection, memory, self._identity, self._host, self._forget)
            with self._lock:
                self._peers.add(peer)
                closed = self._closed
            if closed:
                peer.drop()
                return
            # Before the welcome, after which the router may call at once.
            peer.start()
            welcome = links_pb2.Welcome(
                group=self._identity.group,
                incarnation=self._identity.incarnation,
                nonce=memory[:NONCE_BYTES].tobytes(),
            )
            connection.send(encode_welcome(welcome))
        except (OSError, ValueError) as exc:
            log.warning("handshake on the local socket failed: %s", exc)
            if peer is None:
                connection.close()
            else:
                peer.hang_up()  # the compute thread has it, and its descriptor must not be another's before it knows
        finally:
            for fd in fds:
                os.close(fd)
            self._slots.release()

    def _forget(self, peer: _Peer) -> None:
        with self._lock:
            self._peers.discard(peer)

    def num_links(self) -> int:
        """Routers that have a link now."""
        with self._lock:
            return len(self._peers)

    def drop_links(self) -> None:
        """Ends all links, as a fault would."""
        with self._lock:
            peers = list(self._peers)
        for peer in peers:
            peer.hang_up()

    def close(self) -> None:
        """Ends the socket and all links."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.drop_links()
        self._thread.join(timeout=5)


def _memory_problem(fds: list[int], hello: links_pb2.Hello | None) -> str:
    """Why the memory that a router sent cannot be used; empty if it can."""
    if hello is None or len(fds) != 1:
        return f"one piece of memory must come with the handshake, {len(fds)} came"
    size = hello.memory_bytes
    if not NONCE_BYTES <= size <= 4 * MEMORY_BYTES or os.fstat(fds[0]).st_size != size:
        return f"the memory must have the {size} bytes that the handshake says"
    try:
        sealed = fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        sealed = False
    return "" if sealed else "the memory must be sealed against changes of its size"


class _Known:
    """The form of a call's payload, and views of it. The same blocks are used again and again for calls of the same
    shape, and checking a form and making views takes longer than reading them, so all are kept."""

    __slots__ = ("_pairs", "_rows_TH", "form")

    def __init__(self, form: CallForm, rows_TH: torch.Tensor) -> None:
        self.form, self._rows_TH = form, rows_TH
        self._pairs: dict[int, LayerRows] = {}

    def rows(self, memory: Bytes, num_pairs: int) -> LayerRows:
        """With so many pairs."""
        rows = self._pairs.get(num_pairs)
        if rows is None:
            if len(self._pairs) >= MAX_COUNTS:
                self._pairs.clear()
            rows = LayerRows(self._rows_TH, pairs_over(memory, num_pairs, self.form.pairs_offset))
            self._pairs[num_pairs] = rows
        return rows


class _Peer:
    """One router's link."""

    def __init__(
        self,
        connection: socket.socket,
        memory: Bytes,
        identity: Identity,
        host: ExpertHost,
        forget: Callable[[_Peer], None],
    ) -> None:
        self._socket, self._memory, self._identity, self._host = connection, memory, identity, host
        self._forget = forget
        self._base = memory.ctypes.data
        self._fd = connection.fileno()
        self.calls: dict[int, _ShmReply] = {}
        self._frame = (ctypes.c_char * FRAME_BYTES)()
        self._view = memoryview(self._frame).cast("B")
        self._answers = Answers(self._fd, REPLY_BYTES, ANSWERED_AT) if can_listen() else None
        self._forms: dict[bytes, _Known] = {}
        self._send_lock = threading.Lock()
        self._backlog: deque[bytes] = deque()
        self._gone = False

    def start(self) -> None:
        """Hands the socket to the compute thread."""
        self._socket.setblocking(False)
        frame = ctypes.addressof(self._frame), FRAME_BYTES
        self._host.sockets.watch(self._fd, self._ready, frame, (self._base, self._memory.size))

    def hang_up(self) -> None:
        """Ends the connection; the compute thread sees it and cleans up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    # -- in the compute thread -------------------------------------------------------------------------------------

    def _ready(self, _events: int, size: int) -> None:
        if self._backlog:
            self._flush()
        if size == UNREAD:
            try:
                size = self._socket.recv_into(self._frame)
            except OSError as exc:
                size = -(exc.errno or errno.EIO)
        if size == -errno.EAGAIN:
            return
        if size <= 0:
            self.drop()
            return
        frame = self._view[:size]
        kind = frame[0]
        try:
            while kind == _ORDER:
                order, frame = decode_order(frame)
                self._host.order(order)
                if not frame:
                    return
                kind = frame[0]
            if kind == _CALL:
                self._take(frame)
            elif kind == _CANCEL:
                cancelled = self.calls.get(decode_call_id(frame))
                if cancelled is not None:
                    self._host.cancel(cancelled)
            elif kind != _WAKE:  # which has done what it is for
                raise InvalidArgument("frame", kind, "neither a call nor what belongs to one")
        except InvalidArgument as exc:
            call_id = call_id_of(frame) if kind == _CALL else 0
            if call_id:
                self.send(encode_error(call_id, exc))
            else:
                log.warning("local link ended: %s", exc)
                self.drop()

    def _take(self, frame: memoryview) -> None:
        key = bytes(frame[:FORM_BYTES])
        known = self._forms.get(key)
        if known is None:
            known = self._look_at(key)
        form = known.form
        call, num_pairs = decode_ids(frame)
        if form.pairs_offset + PAIR_BYTES * num_pairs > self._memory.size:
            raise InvalidArgument("num_pairs", num_pairs, "they must be inside this link's memory")
        pending = self.calls[call.call_id] = _ShmReply(self, call, form)
        self._host.submit_here(call, known.rows(self._memory, num_pairs), pending)

    def _look_at(self, key: bytes) -> _Known:
        """What a header says of its payload."""
        form = decode_form(key)
        size = self._memory.size
        if (
            form.placement is not Placement.SHARED
            or form.rows_offset + form.rows_bytes > size
            or form.reply_offset + form.reply_bytes > size
            or (form.rows_offset | form.pairs_offset | form.reply_offset) & 3
        ):
            raise InvalidArgument("offset", form[-5:], "not inside this link's memory")
        if len(self._forms) >= MAX_FORMS:
            self._forms.clear()
        known = self._forms[key] = _Known(form, rows_over(form, self._memory))
        return known

    def drop(self) -> None:
        """Ends the link from this side; its calls are not computed any more."""
        if self._gone:
            return
        self._gone = True
        with contextlib.suppress(OSError, ValueError):
            self._host.sockets.unwatch(self._fd)
        for pending in list(self.calls.values()):
            self._host.cancel(pending)
        self.calls.clear()
        self._forms.clear()
        self._socket.close()
        self._forget(self)

    # -- answers, from any thread ----------------------------------------------------------------------------------

    def answer(self, call_id: int, form: CallForm, reply: LayerReply) -> None:
        """Writes the rows beside the call's and rings the bell."""
        partial_TH = on_cpu(reply.partial_TH)
        if partial_TH.nbytes != form.reply_bytes:
            self.send(encode_error(call_id, InternalError("the answer does not have the call's shape")))
            return
        at = self._base + form.reply_offset
        if self._answers is None or self._backlog or form.reply_bytes > MAX_MOVED_BYTES:
            copy_out(partial_TH, at, form.reply_bytes)
            self.send(reply_header(call_id, reply, Placement.SHARED, time.monotonic()))
            return
        put_reply_header(self._answers.packet, call_id, reply, Placement.SHARED)
        if self._answers.send(partial_TH.data_ptr(), at, form.reply_bytes):
            self.send(bytes(self._answers.packet))  # which knows what to do

    def send(self, frame: bytes) -> None:
        """Never blocks: what the socket does not take waits until it does."""
        with self._send_lock:
            if not self._backlog:
                try:
                    self._socket.send(frame)
                    return
                except BlockingIOError:
                    with contextlib.suppress(OSError, ValueError):
                        self._host.sockets.want_write(self._fd, True)
                except OSError:
                    return  # the router is gone; reading tells
            self._backlog.append(frame)

    def _flush(self) -> None:
        with self._send_lock:
            while self._backlog:
                try:
                    self._socket.send(self._backlog[0])
                except BlockingIOError:
                    return
                except OSError:
                    self._backlog.clear()
                    break
                self._backlog.popleft()
            with contextlib.suppress(OSError, ValueError):
                self._host.sockets.want_write(self._fd, False)


class _ShmReply(PendingReply):
    """Goes back over the peer as soon as it is there. Nobody waits for it, so taking it from the peer's calls is all
    that decides who answers first."""

    __slots__ = ("_peer", "form")

    def __init__(self, peer: _Peer, call: LayerCall, form: CallForm) -> None:
        self._peer, self.call, self.form = peer, call, form

    def done(self) -> bool:
        return self.call.call_id not in self._peer.calls

    def resolve(self, reply: LayerReply, answered_s: float | None = None) -> bool:
        if self._peer.calls.pop(self.call.call_id, None) is None:
            return False
        self._peer.answer(self.call.call_id, self.form, reply)
        return True

    def fail(self, error: ExpertMeshError) -> bool:
        if self._peer.calls.pop(self.call.call_id, None) is None:
            return False
        self._peer.send(encode_error(self.call.call_id, error))
        return True
