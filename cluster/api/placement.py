"""The coordinator's view of placement as protos."""

from __future__ import annotations

import dataclasses
from typing import Any

from cluster.errors import InvalidArgument
from cluster.rpc.v1 import control_pb2

_NAMES = frozenset(control_pb2.PlacementReceipt.DESCRIPTOR.fields_by_name)


def change_of(request: control_pb2.ChangePlacementRequest) -> tuple[str, int]:
    """The change that is asked for, and its value.

    Raises:
        InvalidArgument: none is.
    """
    kind = request.WhichOneof("change")
    if kind is None:
        raise InvalidArgument("change", "nothing", "one of groups, drain, give_back, rebalance and balance must be set")
    return kind, int(getattr(request, kind))


def placement_reply(view: Any) -> control_pb2.PlacementReply:
    """``view`` is the coordinator's ``PlacementView``."""
    reply = control_pb2.PlacementReply(
        balance=view.balance,
        autoscale_min=view.autoscale[0],
        autoscale_max=view.autoscale[1],
        autoscale_why=view.autoscale_why,
        drained=view.drained,
        windows=view.windows,
        window_s=view.window_s,
        progress_age_s=view.progress_age_s,
    )
    if view.balance_now is not None:
        reply.balance_now = view.balance_now
    for receipt in view.receipts:
        told = {name: value for name, value in dataclasses.asdict(receipt).items() if name in _NAMES}
        reply.receipts.add(**{name: value for name, value in told.items() if value is not None})
    for router in sorted(view.routers, key=lambda report: report.address):
        reply.routers.add(
            address=router.address, pid=router.pid, host=router.host, draining=router.draining, live=router.live
        )
    return reply
