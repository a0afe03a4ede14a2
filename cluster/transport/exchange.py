"""Layer calls to several groups over shared memory, sent and answered together by two compiled calls.

Each link keeps a seat for them: memory for rows, pairs and answer, and a header of which only the numbers change. A
call that does not end well becomes one of its link's, with its seat, as if the link had sent it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cluster.core import LayerCall
from cluster.kernels.exchange import BROKEN, FULL, GOOD, IDLE, OTHER, Exchange, Frames, Outcome, Seat
from cluster.kernels.rows import Owners
from cluster.transport.base import LayerRows, PendingReply
from cluster.transport.codec import CALL_BYTES, FORM_BYTES, IDS_BYTES, put_ids
from cluster.transport.greeting import FRAME_BYTES
from cluster.transport.orders import MAX_BYTES
from cluster.transport.replies import decode_times
from cluster.transport.shm import ShmTransport
from cluster.transport.slot import Slot

_GOOD_WORD_BYTES = 4


class Left(NamedTuple):
    """A call of the link ``number`` that did not end well, or ended with others that did not: it is the link's now.
    ``row_index`` are the rows that it was sent, None where it has all. ``pending`` is None where the link took nothing;
    the rows are nobody else's then."""

    number: int
    row_index: torch.Tensor | None
    rows: LayerRows
    pending: PendingReply | None
    num_experts: int


class ShmExchange:
    """Calls to the same links, one after another, of at most ``num_rows`` rows and ``max_pairs`` pairs. One thread's.

    `enter`, `send`, `wait`, then `answers` or else `left`, and in any case `leave`.
    """

    def __init__(
        self,
        links: Sequence[ShmTransport],
        slots: Sequence[Slot],
        exchange: Exchange,
        headers: Sequence[memoryview],
        ids: bytearray,
    ) -> None:
        self.links, self._slots, self._exchange, self._headers, self._ids = links, slots, exchange, headers, ids
        self._before: list[bytes] = []
        self._last: list[list[float]] = []
        self._num_rows = 0
        self._sent_s = 0.0
        self._entered = False
        self.spent = False
        """Its memory belongs to calls: it cannot be used again."""

    @classmethod
    def over(
        cls, links: Sequence[ShmTransport], num_rows: int, width: int, max_pairs: int, num_experts: int
    ) -> ShmExchange | None:
        """None where a link has no memory left. ``links`` are in the order in which answers are added."""
        slots: list[Slot] = []
        seats: list[Seat] = []
        headers: list[memoryview] = []
        for link in links:
            slot = link.seats.take((num_rows, width), max_pairs)
            if slot is None:
                for each in slots:
                    each.give_back()
                return None
            buffer = ctypes.create_string_buffer(MAX_BYTES + CALL_BYTES)
            header = memoryview(buffer).cast("B")
            header[MAX_BYTES : MAX_BYTES + FORM_BYTES] = slot.header
            slots.append(slot)
            headers.append(header)
            header_at = ctypes.addressof(buffer) + MAX_BYTES
            where = link.seats.addresses(slot)
            seats.append(Seat(link.group, link.fd, *where, header_at, link.frame_at, FRAME_BYTES))
        good = int.from_bytes(slots[0].answered.good[:_GOOD_WORD_BYTES], "little")
        ids = bytearray(IDS_BYTES)
        ids_at = ctypes.addressof((ctypes.c_char * IDS_BYTES).from_buffer(ids))
        frames = Frames(CALL_BYTES, FORM_BYTES, ids_at, good)
        return cls(links, slots, Exchange(seats, num_rows, width, num_experts, frames), headers, ids)

    def wake(self) -> None:
        """Groups may wake up: a call is about to be sent. Those that were not called the last time are not."""
        for number, link in enumerate(self.links):
            if not self._last or self._last[number][0] != IDLE:
                link.wake()

    def enter(self) -> bool:
        """Whether all links can be used now: none is broken, and nobody reads."""
        for number, link in enumerate(self.links):
            if not link.enter():
                for entered in self.links[:number]:
                    entered.leave()
                return False
        self._entered = True
        return True

    def send(
        self,
        call: LayerCall,
        owners: Owners,
        hidden_TH: torch.Tensor,
        pairs_at: tuple[int, int, int],
        num_pairs: int,
    ) -> tuple[torch.Tensor, float]:
        """Sends each group its rows (fp32, contiguous); ``pairs_at`` are addresses of the pairs' rows (int64,
        ascending), experts (int64) and weights (fp32). Where the sum will be, and when all was sent.

        Raises:
            IndexError: as `cluster.kernels.rows.divide_into`; nothing was sent.
        """
        self._num_rows = num_rows = hidden_TH.shape[0]
        put_ids(self._ids, call)
        for link in self.links:
            if link.has_orders or self._before:
                self._put_orders_before(call)
                break
        total_TH = torch.empty(hidden_TH.shape, dtype=torch.float32)
        where = hidden_TH.data_ptr(), num_rows
        self._sent_s = self._exchange.send(owners, where, pairs_at, num_pairs, total_TH.data_ptr(), call.call_id)
        if self._before:
            self._send_orders_alone()
        return total_TH, self._sent_s

    def wait(self, seconds: float) -> bool:
        """Waits for all answers, at most so long, and adds them in the order of the links; whether all were good."""
        return self._exchange.wait(seconds)

    @property
    def began_s(self) -> float:
        """When the wait began."""
        return self._exchange.began_s

    def answers(self) -> list[list[float]]:
        """The fields of an `Outcome` of each link."""
        self._last = self._exchange.outcomes()
        return self._last

    def load_of(self, number: int) -> tuple[int, int]:
        """Bytes and expert of a load that a link's good answer says it waited for."""
        *_, load_bytes, expert = decode_times(self.links[number].frame)
        return load_bytes, expert

    def _put_orders_before(self, call: LayerCall) -> None:
        self._before = [link.orders_for(call) for link in self.links]
        for number, (before, header) in enumerate(zip(self._before, self._headers, strict=True)):
            header[MAX_BYTES - len(before) : MAX_BYTES] = before
            self._exchange.put_before(number, len(before))
        if not any(self._before):
            self._before = []

    def _send_orders_alone(self) -> None:
        """Those of groups that are not called."""
        for number, told in enumerate(self.answers()):
            before = self._before[number]
            if before and Outcome(*told).state == IDLE:
                self.links[number].send_orders(before)

    def left(self, call: LayerCall) -> list[Left]:
        """Makes what was sent, and has not ended well as a whole, calls of the links."""
        self.spent = True
        from_s, left = self._exchange.began_s, []
        for number, outcome in enumerate(Outcome(*told) for told in self.answers()):
            link, slot = self.links[number], self._slots[number]
            if outcome.state == IDLE:
                slot.give_back()
                continue
            num_rows, pending = int(outcome.num_rows), None
            rows = link.seats.rows(slot, num_rows, int(outcome.num_pairs))
            if outcome.state == FULL:
                rows = LayerRows(rows.hidden_TH.clone(), rows.pairs_3P.copy())
                slot.give_back()
            else:
                pending = link.adopt(call, slot, num_rows, self._sent_s)
            if outcome.state in (GOOD, OTHER):
                link.take(self._exchange.came(number), from_s, outcome.arrived_s)
                from_s = outcome.added_s if outcome.state == GOOD else outcome.arrived_s
            elif outcome.state == BROKEN:
                link.ended(-self._exchange.came(number))
            index = None
            if num_rows != self._num_rows:
                index = torch.from_numpy(self._exchange.numbers_GT[link.group, :num_rows].copy())
            left.append(Left(number, index, rows, pending, int(outcome.num_experts)))
        return left

    def give_back(self) -> None:
        """Nobody uses it any more. Between two calls only."""
        if not self.spent:
            self.spent = True
            for slot in self._slots:
                slot.give_back()

    def leave(self) -> None:
        """Lets others read."""
        if self._entered:
            self._entered = False
            for link in self.links:
                link.leave()
