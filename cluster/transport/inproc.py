"""The in-process transport: the group lives in the router's process. Also the fake that tests are built with."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cluster.core import Deadline, GroupId, LayerCall, Order
from cluster.errors import LinkBroken
from cluster.transport.base import CallHandler, LayerReply, LayerRows, PendingReply


class InprocTransport:
    """Hands calls to a group's handler in the same process; tensors are passed, not copied."""

    kind = "inproc"
    address = ""

    def __init__(self, group: GroupId, handler: CallHandler) -> None:
        self.group = group
        self._handler = handler
        self._compute: Callable[[LayerCall, LayerRows], LayerReply] | None = getattr(handler, "at_once", None)
        self._lock = threading.Lock()
        self._open: set[PendingReply] | None = set()

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """See `Transport`."""
        pending = PendingReply(self.group, call)
        with self._lock:
            if self._open is None:
                raise LinkBroken(f"link to group {self.group} is closed")
            self._open = {waiting for waiting in self._open if not waiting.done()} | {pending}
        self._handler.submit(call, rows, pending)
        return pending

    @property
    def inline(self) -> bool:
        """The group computes in the thread that calls it, and can be asked `at_once`."""
        return self._compute is not None

    def at_once(self, call: LayerCall, rows: LayerRows) -> LayerReply:
        """Has the call computed.

        Raises:
            LinkBroken: the link is closed.
            ExpertMeshError: the group's.
        """
        if self._open is None or self._compute is None:
            raise LinkBroken(f"link to group {self.group} is closed")
        return self._compute(call, rows)

    def cancel(self, pending: PendingReply) -> None:
        """See `Transport`."""
        self._handler.cancel(pending)

    def order(self, order: Order, at_once: bool = False) -> None:
        """See `Transport`. Always at once: there is no message to save."""
        self._handler.order(order)

    def healthy(self) -> bool:
        """See `Transport`."""
        return self._open is not None

    def close(self) -> None:
        """See `Transport`."""
        with self._lock:
            waiting, self._open = self._open or set(), None
        for pending in waiting:
            pending.fail(LinkBroken(f"link to group {self.group} was closed"))
