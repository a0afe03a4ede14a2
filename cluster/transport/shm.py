"""The shared-memory transport, router's side: payloads in memory that both ends map, a local socket as the door bell.

The router makes the memory (`memfd`), keeps its accounts, and passes it over a socket of Linux's abstract namespace;
neither has a name in a file system, so whatever way either end dies, nothing is left to clean up. For each call the
router allocates one block for the rows and their answer. The group computes on the rows where they lie and writes the
answer beside them: one copy on each side (of rows that are written into a `Room`, none on this one). Waits block in the
kernel, and whoever waits for an answer reads the socket itself, so that an answer crosses no other thread.

That both ends are on one host is proved, not believed: the group reads a nonce from the memory and sends it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import socket
import struct
import threading
import time

import numpy as np
import torch

from cluster.core import Clock, Deadline, GroupId, LayerCall, Order
from cluster.errors import DeadlineExceeded, ExpertMeshError, InternalError, InvalidArgument, LinkBroken
from cluster.kernels.exchange import TICK_NS
from cluster.rpc.v1 import links_pb2
from cluster.transport.arena import Home, LeasedMemory
from cluster.transport.base import LayerReply, LayerRows, PendingReply
from cluster.transport.codec import (
    PAIR_BYTES,
    WAKE,
    encode_cancel,
    encode_ids,
    encode_order,
    on_cpu,
)
from cluster.transport.greeting import FRAME_BYTES, NONCE_BYTES, greet
from cluster.transport.mapped import SEALS, copy_out, map_memory
from cluster.transport.orders import WaitingOrders
from cluster.transport.replies import (
    decode_reply_head,
    decode_times,
    raise_for_status,
)
from cluster.transport.seats import Seats
from cluster.transport.slot import Answered, Slot

_FP32 = np.dtype("<f4")
MEMORY_BYTES = 1024**3
"""Address space of one link. Pages take memory once they are touched, and blocks are taken from the low end."""
KEPT_BYTES = 32 * 1024**2
"""What is above goes back to the system as soon as a link is idle, seats apart."""
SEATS_SHARE = 32
"""The low end of so much is for seats: 32 MiB, of which what has been used once stays with the link."""
REUSED_BYTES = 512 * 1024
"""Blocks up to this size are kept for the next call of the same shape."""
TICK_S = TICK_NS * 1e-9


class _PumpedReply(PendingReply):
    """A reply whose waiter reads the socket. ``partial_TH``, once it is there, owns the slot."""

    __slots__ = ("answered", "link", "partial_TH", "slot")

    def __init__(self, link: ShmTransport, call: LayerCall, slot: Slot, answered: Answered) -> None:
        super().__init__(link.group, call, link.clock, latched=False)
        self.link, self.slot, self.answered = link, slot, answered
        self.partial_TH: torch.Tensor | None = None

    def _wait(self, deadline: Deadline) -> None:
        self.link.pump(self, deadline)
        broken = self.link.broken
        if broken is not None:  # whoever found that out is about to say so here too
            self.fail(LinkBroken(str(broken)))


class ShmTransport:
    """A link to a group on the same host. ``address`` is the group's socket in the abstract namespace.

    Raises (constructor):
        LinkRefused: as for the gRPC transport.
        LinkBroken: no such socket here, no answer in time, or the memory is not the same at the other end.
    """

    kind = "shm"

    def __init__(
        self,
        group: GroupId,
        address: str,
        hello: links_pb2.Hello,
        deadline: Deadline,
        memory_bytes: int = MEMORY_BYTES,
        clock: Clock = time.monotonic,
    ) -> None:
        self.group, self.address, self.clock = group, address, clock
        self._waiting: dict[int, _PumpedReply] = {}
        self.broken: ExpertMeshError | None = None
        self._reader = threading.Lock()  # held by whoever reads the socket
        self._turn = threading.Condition()
        self._num_followers = 0
        self._orders = WaitingOrders()
        self._frame = (ctypes.c_char * FRAME_BYTES)()
        self._view = memoryview(self._frame).cast("B")
        fd = os.memfd_create(f"expertmesh-link-{group}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, memory_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            self._map = map_memory(fd, memory_bytes)
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                greet(self._socket, (fd, self._map), address, group, hello, deadline)
            except BaseException:
                self._socket.close()
                raise
        finally:
            os.close(fd)
        memory = np.frombuffer(self._map, np.uint8)
        # Seats are kept for long, and apart: what is beside them is given back to the system when it is free.
        seats_end = memory_bytes // SEATS_SHARE
        self.seats = Seats(memory[:seats_end], NONCE_BYTES)
        self._kept = seats_end + KEPT_BYTES
        self._memory = LeasedMemory(memory, seats_end, self._kept, self._trim)
        self._base, self.fd, self.frame_at = memory.ctypes.data, self._socket.fileno(), ctypes.addressof(self._frame)
        # Reading blocks in the kernel for a tick at most, which spares a call of poll; sending never blocks.
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, int(TICK_S * 1e6)))
        self._readable = select.poll()
        self._readable.register(self._socket, select.POLLIN)

    def _trim(self, high: int) -> None:
        with contextlib.suppress(OSError):  # not every kernel can; the memory then stays with the link
            self._map.madvise(mmap.MADV_REMOVE, self._kept, -(-high // mmap.PAGESIZE) * mmap.PAGESIZE - self._kept)

    # -- calls -----------------------------------------------------------------------------------------------------

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """See `Transport`."""
        hidden_TH, pairs_3P = rows
        num_pairs = pairs_3P.shape[1]
        slot = self._slot(hidden_TH, num_pairs, deadline)
        answered, frame = slot.answered, self._orders.take(call) + slot.header + encode_ids(call, num_pairs)
        rows_TH = on_cpu(hidden_TH)
        copy_out(rows_TH, slot.address, slot.rows_bytes)
        if num_pairs:
            self._map[slot.pairs_offset : slot.pairs_offset + PAIR_BYTES * num_pairs] = pairs_3P.data
        # Setting and popping are atomic, and whoever breaks the link says so before it looks at who waits.
        pending = self._waiting[call.call_id] = _PumpedReply(self, call, slot, answered)
        try:
            if self.broken is None:
                self._send(frame, deadline)
        except DeadlineExceeded:
            if self._waiting.pop(call.call_id, None) is not None:
                slot.give_back()  # of which the group has not been told
            raise
        if self.broken is not None:
            self._waiting.pop(call.call_id, None)
            raise LinkBroken(str(self.broken))
        # The group is at work now: what the answer needs is made meanwhile, unless somebody reads answers already.
        if self._reader.acquire(blocking=False):
            if call.call_id in self._waiting:
                pending.partial_TH = self._lease(slot, answered)
            self._reader.release()
            if self._num_followers:
                self._wake_followers()
        return pending

    def _lease(self, slot: Slot, answered: Answered) -> torch.Tensor:
        return torch.from_numpy(self._memory.lease(slot, slot.reply_offset, answered.shape, _FP32))

    def _slot(self, hidden_TH: torch.Tensor, num_pairs: int, deadline: Deadline) -> Slot:
        kind = (hidden_TH.shape, hidden_TH.dtype, num_pairs.bit_length())
        try:
            return self._memory.home(kind).pop()  # type: ignore[no-any-return]
        except IndexError:
            return self._new_slot(kind, deadline)

    def _new_slot(self, kind: tuple[torch.Size, torch.dtype, int], deadline: Deadline) -> Slot:
        (num_tokens, hidden_size), dtype, bits = kind
        shape = (num_tokens, hidden_size)
        size = Slot.size_for(shape, dtype, 1 << bits)
        if size > self._memory.capacity:
            limit = self._memory.capacity
            raise InvalidArgument("payload", size, f"with its answer it must fit {limit} bytes: split it")
        # Large ones are seldom of the same shape again, and would keep much memory: their blocks are divided anew.
        home = self._memory.home(kind if size <= REUSED_BYTES else None)

        def make(offset: int, size: int, home: Home) -> Slot:
            return Slot(offset, size, home, self._base, shape, dtype)

        while (slot := self._memory.make(home, size, make)) is None:
            if self.broken is not None:
                raise LinkBroken(str(self.broken))
            if deadline.expired():
                raise DeadlineExceeded(f"the memory of the link to group {self.group} is full")
            # Answers that arrive give memory back; those that somebody still looks at do so without a message.
            self.pump(None, deadline.earlier(Deadline.after(0.005, self.clock)))
        assert isinstance(slot, Slot)
        return slot

    def _send(self, frame: bytes, deadline: Deadline) -> None:
        while True:
            try:
                self._socket.send(frame, socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                # The group has not read for a while: it computes.
                if deadline.expired():
                    raise DeadlineExceeded(f"group {self.group} takes no more calls") from None
                select.select([], [self._socket], [], min(0.1, deadline.remaining_s()))
            except OSError as exc:
                self._break(LinkBroken(f"shared-memory link to group {self.group} broke: {exc.strerror or exc}"))
                return  # the pending reply has failed with it

    def cancel(self, pending: PendingReply) -> None:
        """See `Transport`. The call's memory is free when the group has answered, which it does in any case."""
        pending.fail(DeadlineExceeded(f"call {pending.call.call_id} to group {self.group} was cancelled"))
        if self._waiting.get(pending.call.call_id) is pending and self.broken is None:
            # When the socket is full the group computes the call for nothing.
            with contextlib.suppress(DeadlineExceeded):
                self._send(encode_cancel(pending.call.call_id), Deadline(0.0))

    def order(self, order: Order, at_once: bool = False) -> None:
        """See `Transport`. Lost when the socket is full, or the order is longer than a packet."""
        if not at_once:
            self._orders.add(order)
            return
        self.send_orders(encode_order(order))

    def send_orders(self, frames: bytes) -> None:
        """Sends orders that wait for no call; lost as those of `order`."""
        if self.broken is None and len(frames) <= FRAME_BYTES:
            with contextlib.suppress(DeadlineExceeded):
                self._send(frames, Deadline(0.0))

    # -- calls that are written and answered elsewhere: see `cluster.transport.exchange` -----------------------------

    def wake(self) -> None:
        """A call is about to be sent: the group need not sleep until it is. Never waits or raises."""
        with contextlib.suppress(OSError):
            self._socket.send(WAKE, socket.MSG_DONTWAIT)

    def enter(self) -> bool:
        """Whether the calling thread may send and read by itself now, until it calls `leave`."""
        if self.broken is not None or not self._reader.acquire(blocking=False):
            return False
        if self.broken is not None:
            self._reader.release()
            return False
        return True

    def leave(self) -> None:
        """Somebody else may read."""
        self._reader.release()
        self._wake_followers()

    @property
    def has_orders(self) -> bool:
        """Orders wait for a call."""
        return bool(self._orders)

    def orders_for(self, call: LayerCall) -> bytes:
        """Frames that go in front of this call, which are forgotten with that."""
        return self._orders.take(call)

    @property
    def frame(self) -> memoryview:
        """What whoever entered has read last."""
        return self._view

    def adopt(self, call: LayerCall, slot: Slot, num_rows: int, sent_s: float) -> PendingReply:
        """A call that was sent from a seat is one of this link's from now on, and so is the seat's memory."""
        pending = _PumpedReply(self, call, slot, slot.answered_with(num_rows))
        pending.sent_s = sent_s
        self._waiting[call.call_id] = pending
        if self.broken is not None:
            self._waiting.pop(call.call_id, None)
            pending.fail(LinkBroken(str(self.broken)))
        return pending

    def take(self, size: int, began_s: float, arrived_s: float) -> None:
        """Delivers so many bytes that whoever entered has read into the seat's buffer, and when."""
        self._deliver(self._view[:size], began_s, arrived_s)

    def ended(self, error: int) -> None:
        """Whoever entered found the connection ended, with an error's number or 0."""
        why = os.strerror(error) if error else "the group closed it"
        self._break(LinkBroken(f"shared-memory link to group {self.group} broke: {why}"))

    # -- answers ---------------------------------------------------------------------------------------------------

    def pump(self, pending: PendingReply | None, deadline: Deadline) -> None:
        """Reads answers until ``pending`` has one (None: until any came), the link broke or the time is up.

        One thread reads at a time; the others wait for their answer or for their turn.
        """
        while self.broken is None and not (pending is not None and pending.done()):
            if self._reader.acquire(blocking=False):
                try:
                    # Whoever read before may have had the answer in hand already.
                    while self.broken is None and not (pending is not None and pending.done()):
                        got = self._receive(deadline.remaining_s())
                        if pending is None:
                            if got or deadline.expired():
                                return
                        elif pending.done() or (not got and deadline.expired()):
                            return
                finally:
                    self._reader.release()
                    self._wake_followers()
                return
            with self._turn:
                self._num_followers += 1
                try:
                    # Asked again once counted: who reads now looks at the count after letting go.
                    if self._reader.locked() and not (pending is not None and pending.done()):
                        self._turn.wait(min(deadline.remaining_s(), threading.TIMEOUT_MAX))
                finally:
                    self._num_followers -= 1
            if deadline.expired():
                return

    def _receive(self, timeout_s: float) -> bool:
        """One packet; False if none came in time."""
        began_s = self.clock()
        try:
            if timeout_s < TICK_S and not self._readable.poll(timeout_s * 1000):
                return False
            size = self._socket.recv_into(self._frame)
        except BlockingIOError:
            return False
        except OSError as exc:
            self._break(LinkBroken(f"shared-memory link to group {self.group} broke: {exc.strerror or exc}"))
            return False
        if not size:
            self._break(LinkBroken(f"group {self.group} closed the shared-memory link"))
            return False
        self._deliver(self._view[:size], began_s)
        return True

    def _deliver(self, frame: memoryview, began_s: float, arrived_s: float | None = None) -> None:
        try:
            call_id, queue_s, compute_s, answered_s, load_s, load_bytes, expert = decode_times(frame)
        except InvalidArgument as exc:
            self._break(LinkBroken(f"group {self.group} sent no reply: {exc}"))
            return
        pending = self._waiting.pop(call_id, None)
        if pending is None:
            return  # answered twice
        partial_TH = pending.partial_TH
        if partial_TH is None:
            partial_TH = self._lease(pending.slot, pending.answered)
        if frame[: len(pending.answered.good)] == pending.answered.good:
            # Both clocks are one: an answer that lay in the socket before anybody read came when the group says.
            if not pending.sent_s <= answered_s < began_s:
                answered_s = self.clock() if arrived_s is None else arrived_s
            reply = LayerReply(partial_TH, queue_s, compute_s, load_s, expert, load_bytes)
            pending.resolve(reply, answered_s)
        else:
            pending.partial_TH = partial_TH  # whoever sends these rows elsewhere reads them first
            try:
                raise_for_status(
                    decode_reply_head(frame), frame, self.group, pending.call.layer, pending.answered.shape
                )
                raise InternalError(f"group {self.group} answered in a form that nobody asked for")
            except ExpertMeshError as exc:
                pending.fail(exc)
        if self._num_followers:
            self._wake_followers()

    def _wake_followers(self) -> None:
        if self._num_followers:
            with self._turn:
                self._turn.notify_all()

    # -- life ------------------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """See `Transport`. Looks at the socket when nobody else does: a dead group closes it."""
        if self.broken is None and self._reader.acquire(blocking=False):
            try:
                while self._receive(0.0):
                    pass
                self._memory.relax()
            finally:
                self._reader.release()
                self._wake_followers()
        return self.broken is None

    def close(self) -> None:
        """See `Transport`."""
        self._break(LinkBroken(f"link to group {self.group} was closed"))
        if self._reader.acquire(timeout=5.0):  # who reads now is woken by the end of the connection
            self._socket.close()
            self._reader.release()
        self._memory.close()
        self.seats.close()

    def _break(self, error: ExpertMeshError) -> None:
        if self.broken is None:
            self.broken = error
        waiting = list(self._waiting.values())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for pending in waiting:
            pending.fail(LinkBroken(str(error)))
        self._wake_followers()
