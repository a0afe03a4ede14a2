"""A layer's rows divided among groups and sent to them, and their answers awaited and added: two compiled calls.

Between two products of a decode step nothing of the interpreter is in the caches, and every line of it that runs before
the groups are at work is one that they wait for. Here the rows are written into memory that each group maps, a header
goes to each over a local socket, and answers are read from the sockets and added from where they lie. Whatever is not
as expected ends the call with a state that says how far it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cluster.kernels.rows import FEW, FIRST, Owners
from cluster.kernels.team import kept_alone, kept_waiting, work_of

IDLE, SENT, GOOD, OTHER, BROKEN, LATE, FULL = range(7)
"""States of a link's call: nothing was sent, since it has no pairs; sent; answered as was hoped, and added; something
else came; the connection ended; nothing came in time; the socket took no more."""

# Numbers of an exchange behind those of a division, and then those of each link.
NUMBERS, LINK = 12, 10
LINKS, TOTAL, WAIT_NS, SCRATCH, SENT_NS, BEGAN_NS, GOOD_WORD, HEADER_BYTES, IDS_AT, IDS, TOLD, STATE_OF_ALL = range(
    NUMBERS
)
GROUP, FD, HEADER, BEFORE, REPLY, CALL, STATE, SIZE, BUFFER, BUFFER_BYTES = range(LINK)
DIVISION = 14
"""Where in a division's numbers those of its groups begin."""
SHAPE, CALL_ID, TIMES = 4, 12, 20
"""Where rows and width are in a header and in a reply, and in a reply the call's id and seconds: of queueing, of
computing, by the group's clock, and of loading."""
FOUND = 10
"""Numbers that are told of each link: those of an `Outcome`."""
TICK_NS = 50_000_000
"""A socket that is read here stops waiting by itself after so long."""
_COMPILED = "exchange_compiled"


class Seat(NamedTuple):
    """Addresses of what a link's call needs: memory for its rows, pairs and reply; its header; and the ``buffer`` that
    the connection ``fd`` is read into."""

    group: int
    fd: int
    rows_at: int
    pairs_at: int
    reply_at: int
    header_at: int
    buffer_at: int
    buffer_bytes: int


class Frames(NamedTuple):
    """Bytes of a header, where in it the ids begin (the first of them is the number of pairs), the address of those
    that are to be sent next, and the first four bytes of a good reply."""

    header_bytes: int
    ids_from: int
    ids_at: int
    good: int


class Outcome(NamedTuple):
    """Of one link: what became of its call, what it was sent; what a good reply says of its times; when it came, and
    when it had been added, by the monotonic clock, in seconds."""

    state: float
    num_rows: float
    num_pairs: float
    num_experts: float
    queue_s: float
    compute_s: float
    answered_s: float
    load_s: float
    arrived_s: float
    added_s: float


class Exchange:
    """Calls to the same links, one after another, of at most ``num_rows`` rows. The seats are in the order in which
    answers are added."""

    def __init__(self, seats: Sequence[Seat], num_rows: int, width: int, num_experts: int, frames: Frames) -> None:
        num_groups = 1 + max(seat.group for seat in seats)
        self._num_experts, self._num_rows, self._places = num_experts, num_rows, num_groups + 1
        self._groups = [seat.group for seat in seats]
        self._found = np.zeros(FIRST + 5 * (num_groups + 1) + 2 * num_experts, np.int64)
        self._scratch = np.zeros(4, np.int64)
        self.numbers_GT = np.zeros((num_groups, num_rows), np.int64)
        """The rows that each group was sent, in the first of its places."""
        numbers_at: int = self.numbers_GT.ctypes.data
        found_at: int = self._found.ctypes.data
        division = [0, 0, 0, 0, num_experts, 0, num_groups, 0, 0, width, found_at, 0]
        division += [found_at + 8 * (FIRST + 5 * (num_groups + 1)), *[0] * (3 * (num_groups + 1))]
        links: list[int] = []
        for seat in seats:
            at = DIVISION - 1 + 3 * (seat.group + 1)  # the first is nobody's
            division[at : at + 3] = numbers_at + 8 * num_rows * seat.group, seat.rows_at, seat.pairs_at
            links += [seat.group, seat.fd, seat.header_at, 0, seat.reply_at, 0, IDLE, 0]
            links += [seat.buffer_at, seat.buffer_bytes]
        self._told = np.zeros((len(seats), FOUND))
        scratch_at, told_at = self._scratch.ctypes.data, self._told.ctypes.data
        general = [len(seats), 0, 0, scratch_at, 0, 0, frames.good, frames.header_bytes, frames.ids_from]
        general += [frames.ids_at, told_at, 0]
        self._base = 1 + len(division)
        self._at = [self._base + NUMBERS + LINK * number for number in range(len(seats))]
        self._work = work_of([*division, *general, *links])
        self._send_few, self._wait = kept_alone(_COMPILED, "send"), kept_waiting(_COMPILED, "wait")
        self._send_many, self._width = kept_waiting(_COMPILED, "send"), width

    def put_before(self, number: int, num_bytes: int) -> None:
        """So many bytes in front of a link's header are sent with it from now on."""
        self._work[self._at[number] + BEFORE] = num_bytes

    def send(
        self,
        owners: Owners,
        rows: tuple[int, int],
        pairs_at: tuple[int, int, int],
        num_pairs: int,
        total_at: int,
        call_id: int,
    ) -> float:
        """Divides ``rows`` (address and number; see `cluster.kernels.rows.divide_into`) and sends each link its call.
        The total (fp32 [rows, width]) is 0 then. The monotonic clock's seconds afterwards.

        Raises:
            IndexError: as `divide_into`; nothing was sent.
        """
        hidden_at, num_rows = rows
        if owners.num_experts != self._num_experts or not 0 < num_rows <= self._num_rows:
            raise IndexError(f"{num_rows} rows and {owners.num_experts} experts, made for {self._num_rows} and others")
        work, base = self._work, self._base
        work[1] = owners.first_at
        work[2], work[3], work[4] = pairs_at
        work[6], work[8], work[9], work[12] = num_pairs, num_rows, hidden_at, owners.second_at
        work[base + TOTAL] = total_at
        for at in self._at:
            work[at + CALL] = call_id
        (self._send_few if num_rows * self._width <= FEW else self._send_many)(work)
        if work[base + STATE_OF_ALL]:
            raise IndexError(f"{num_pairs} pairs on {num_rows} rows, of {self._num_experts} experts")
        return float(work[base + SENT_NS]) * 1e-9

    def wait(self, seconds: float) -> bool:
        """Waits for the answers, at most so long, and adds them; whether each was good. Once for each `send`. It lets
        go of the interpreter's lock."""
        work, base = self._work, self._base
        work[base + WAIT_NS] = max(0, int(seconds * 1e9))
        self._wait(work)
        return work[base + STATE_OF_ALL] == 0

    @property
    def began_s(self) -> float:
        """When the wait began."""
        return float(self._work[self._base + BEGAN_NS]) * 1e-9

    def outcomes(self) -> list[list[float]]:
        """The fields of an `Outcome` of each link."""
        told: list[list[float]] = self._told.tolist()
        return told

    def came(self, number: int) -> int:
        """Bytes that a link's connection gave last; 0 where it ended, a negative error where it broke."""
        return int(self._work[self._at[number] + SIZE])
