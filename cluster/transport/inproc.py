"""The in-process transport: the group lives in the router's process. Also the fake that tests are built with."""

from __future__ import annotations

from cluster.core import Deadline, GroupId, LayerCall
from cluster.errors import LinkBroken
from cluster.transport.base import CallHandler, LayerRows, PendingReply


class InprocTransport:
    """Hands calls to a group's handler in the same process; tensors are passed, not copied."""

    kind = "inproc"
    address = ""

    def __init__(self, group: GroupId, handler: CallHandler) -> None:
        self.group = group
        self._handler = handler
        self._open: set[PendingReply] | None = set()

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """See `Transport`."""
        if self._open is None:
            raise LinkBroken(f"link to group {self.group} is closed")
        self._open = {pending for pending in self._open if not pending.done()}
        pending = PendingReply(self.group, call)
        self._open.add(pending)
        self._handler.submit(call, rows, pending)
        return pending

    def cancel(self, pending: PendingReply) -> None:
        """See `Transport`."""
        self._handler.cancel(pending)

    def healthy(self) -> bool:
        """See `Transport`."""
        return self._open is not None

    def close(self) -> None:
        """See `Transport`."""
        waiting, self._open = self._open or set(), None
        for pending in waiting:
            pending.fail(LinkBroken(f"link to group {self.group} was closed"))
