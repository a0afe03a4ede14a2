"""A group's side of local sockets: what they bring is awaited and read by one compiled call, and answered by another.

Whoever waits for a layer call wakes up with nothing of the interpreter in its caches, and every line of it that runs
before the answer is out is one that a router waits for.
"""

from __future__ import annotations

import ctypes
import functools

import numpy as np

from cluster.kernels.served import ServedLayers
from cluster.kernels.team import kept_alone, kept_team, kept_waiting, work_of

(
    EPOLL,
    WAITS,
    TIMEOUT_MS,
    EVENTS,
    LINKS,
    NUM_LINKS,
    WAKE,
    NUM,
    SIZE,
    SLEPT,
    SCRATCH_AT,
    LAYERS,
    NUM_LAYERS,
    FREE,
    FREE_BYTES,
    GOOD,
    GOOD_BYTES,
    ANSWER,
    SERVED,
    BUSY_NS,
    SINCE_NS,
    SERVES,
) = range(1, 23)
"""Numbers of a wait: the descriptor of an epoll; whether it waits at all, and for how long; addresses of room for
events and of the links that are read here, and the number of these; the packet that only wakes; and what is found:
events, the size of the packet of the only one (`UNREAD` if none was, an error's number below 0), and whether it
waited. Then room for a time. Then what is served: addresses of layers and their number, of memory that is free and its
size, of a good answer's header and its size, and of room for one; calls that were served, for how long, and since when
one is (0: none is); and whether calls are served now."""
FD, FRAME, FRAME_BYTES, MEMORY, MEMORY_BYTES = range(5)
LINK = 5
"""Numbers of a link: its descriptor, address and size of the room for its packets, and of the memory it shares."""
CALL_FIRST, CALL_TOKENS, CALL_WIDTH, CALL_ROWS, CALL_PAIRS, CALL_REPLY = 0, 4, 8, 12, 20, 28
CALL_NUM_PAIRS, CALL_ID, CALL_LAYER, CALL_PRIORITY, CALL_TRACE, CALL_BYTES = 40, 44, 60, 80, 88, 144
"""Where in a call's packet is what of it: its first word, tokens and width, where rows, pairs and answer are in the
memory, then the number of pairs, id, layer, priority and trace; and its size."""
ANSWER_SHAPE, ANSWER_ID, ANSWER_COMPUTE, ANSWER_DONE = 4, 12, 28, 36
"""The same of an answer."""
SERVED_WORD, URGENT = 0x00010103, 2
"""A call's first word where it is one of rows in fp32, in the memory; and its priority is less than this."""
SOON_NS = 60_000
"""After a packet that wakes, the next one is looked for so long, as far as nobody else wants the core, before this
thread sleeps again: to wake up takes longer."""
TO_FD, REPLY, REPLY_BYTES, DONE_AT, FROM, TO, MOVED, SCRATCH, ERROR = range(1, 10)
"""Numbers of an answer: descriptor; address and size of a packet, and where in it the clock's seconds belong; bytes
that are moved before; room for a time; and the number of the error, or 0."""
UNREAD = -1_000_000
MAX_EVENTS, MAX_LINKS = 64, 64
"""Links beyond are read by the interpreter."""
_COMPILED, _TIMEOUT_MS = "door_compiled", 1000


@functools.cache
def can_listen() -> bool:
    """There is a compiler here."""
    return kept_team(_COMPILED, "listen") is not None


class Door:
    """The sockets of an epoll; ``wake`` is the first byte of a packet of one byte that only wakes whoever waits."""

    def __init__(self, epoll_fd: int, wake: int) -> None:
        self._events = np.zeros(4 * MAX_EVENTS, np.int32)
        self._links = np.full((MAX_LINKS, LINK), -1, np.int64)
        self._scratch = np.zeros(2, np.int64)
        self._served: ServedLayers | None = None
        self._good = self._answer = np.empty(0, np.uint8)
        work = self._work = work_of([0] * SERVES)
        work[EPOLL], work[TIMEOUT_MS], work[NUM_LINKS], work[WAKE] = epoll_fd, _TIMEOUT_MS, MAX_LINKS, wake
        work[EVENTS], work[LINKS] = self._events.ctypes.data, self._links.ctypes.data
        work[SCRATCH_AT] = self._scratch.ctypes.data
        self._listen = kept_waiting(_COMPILED, "listen")

    def serve(self, layers: ServedLayers, good: bytes) -> None:
        """From now on calls of these layers that need nothing else are computed and answered here, with a header like
        ``good``: those in fp32 that are urgent, that nobody traces, and that find nothing else to be done."""
        self._served, self._good = layers, np.frombuffer(good, np.uint8)
        self._answer = np.empty_like(self._good)
        work = self._work
        work[GOOD], work[GOOD_BYTES], work[ANSWER] = self._good.ctypes.data, len(good), self._answer.ctypes.data
        work[LAYERS], work[FREE], work[FREE_BYTES] = layers.places
        work[NUM_LAYERS] = len(layers)  # last: somebody may be listening

    def put(self, fd: int, frame: tuple[int, int], memory: tuple[int, int]) -> None:
        """From now on packets of a connection are read here when nothing else is to be done, to an address where so
        many bytes are; the other place is the memory that it shares. Not thread-safe but for `listen`."""
        self.remove(fd)
        free = np.flatnonzero(self._links[:, FD] < 0)
        if free.size:
            self._links[free[0], FRAME:] = *frame, *memory
            self._links[free[0], FD] = fd

    def remove(self, fd: int) -> None:
        """Ends `put`; not while another thread is in `listen`, unless the connection has no more packets."""
        self._links[self._links[:, FD] == fd, FD] = -1

    @property
    def served(self) -> int:
        """Calls that were computed here."""
        return int(self._work[SERVED])

    @property
    def busy_s(self) -> float:
        """Seconds of computing them."""
        return float(self._work[BUSY_NS]) * 1e-9

    @property
    def since_s(self) -> float:
        """Since when, by the monotonic clock, one is computed; 0 when none is."""
        return float(self._work[SINCE_NS]) * 1e-9

    def listen(self, waits: bool, serves: bool) -> list[tuple[int, int]]:
        """Descriptors and events of sockets that have something now, or if ``waits`` within a second. Calls that can be
        served are, if ``serves``: all that come within a second, or if it does not wait one at most. It lets go of
        the interpreter's lock."""
        work = self._work
        work[WAITS], work[SERVES] = waits, serves
        if self._served is not None:
            work[LAYERS], work[FREE], work[FREE_BYTES] = self._served.places
        self._listen(work)
        num = work[NUM]
        if num <= 0:
            return []
        found: list[list[int]] = self._events[: 2 * num].reshape(num, 2).tolist()
        return [(fd, events) for events, fd in found]

    @property
    def size(self) -> int:
        """Of the packet that was read: `UNREAD` if none was; 0 at the end, and an error's number below 0."""
        return int(self._work[SIZE])

    @property
    def slept(self) -> bool:
        """There was nothing at first."""
        return self._work[SLEPT] != 0


class Answers:
    """Packets of ``num_bytes`` that go out of one connection; ``done_at`` is where in them the clock's seconds belong.
    One thread's at a time."""

    def __init__(self, fd: int, num_bytes: int, done_at: int) -> None:
        self.packet = bytearray(num_bytes)
        """What is sent next."""
        packet_at = ctypes.addressof((ctypes.c_char * num_bytes).from_buffer(self.packet))
        self._scratch = np.zeros(2, np.int64)
        self._work = work_of((fd, packet_at, num_bytes, done_at, 0, 0, 0, self._scratch.ctypes.data, 0))
        self._answer = kept_alone(_COMPILED, "answer")

    def send(self, source: int, to: int, num_bytes: int) -> int:
        """Moves bytes from an address to another and sends the packet with the time of that; an error's number, or 0.
        Never waits."""
        work = self._work
        work[FROM], work[TO], work[MOVED] = source, to, num_bytes
        self._answer(work)
        return int(work[ERROR])
