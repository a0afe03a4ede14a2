"""A group in its router's own process."""

from __future__ import annotations

import time

from cluster.core import Clock, LayerCall, Order
from cluster.errors import ExpertMeshError
from cluster.experts.answering import Compute, Lend, Observe, OnOrder, reply_to
from cluster.experts.loads import LoadNotes
from cluster.transport.base import LayerReply, LayerRows, PendingReply


class InlineHost:
    """A group in its router's own process: calls are computed by the thread that sends them, which would only wait
    for another one, on the cores that this other one needs."""

    def __init__(
        self,
        compute: Compute,
        clock: Clock = time.monotonic,
        notes: LoadNotes | None = None,
        observe: Observe | None = None,
        on_order: OnOrder | None = None,
    ) -> None:
        self._on_order = on_order
        self._compute, self._clock = compute, clock
        self._notes, self._observe = notes or LoadNotes(), observe
        self.calls = 0
        self.busy_s = 0.0
        self._since_s: float | None = None

    def submit(self, call: LayerCall, rows: LayerRows, pending: PendingReply, lend: Lend | None = None) -> None:
        """Computes the call; ``pending`` has its answer afterwards."""
        try:
            pending.resolve(self.at_once(call, rows))
        except ExpertMeshError as exc:
            pending.fail(exc)

    def at_once(self, call: LayerCall, rows: LayerRows) -> LayerReply:
        """Computes the call.

        Raises:
            ExpertMeshError: it could not be computed.
        """
        # A local one: another thread may probe the group meanwhile.
        self._since_s = since_s = self._clock()
        try:
            reply = reply_to(self._compute, call, rows, 0.0, self._clock, self._notes, self._observe)
            self.calls += 1
            return reply
        finally:
            self.busy_s += self._clock() - since_s
            self._since_s = None

    def work(self) -> None:
        """Nothing is left to do."""

    def cancel(self, pending: PendingReply) -> None:
        """Every call has been answered already."""

    def order(self, order: Order) -> None:
        """As `ExpertHost.order`."""
        if self._on_order is not None:
            self._on_order(order)

    def progress_age_s(self) -> float:
        """Seconds since the call in progress began; 0 when there is none."""
        since_s = self._since_s
        return 0.0 if since_s is None else self._clock() - since_s

    def close(self) -> None:
        """Nothing to end."""
