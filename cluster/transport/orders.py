"""Orders that travel in front of the next layer call of their link: no message of their own, nobody woken for them."""

from __future__ import annotations

from cluster.core import LayerCall, Order
from cluster.transport.codec import encode_order

MAX_BYTES = 16 * 1024
"""More does not go in front of a call; it is a hint, and lost."""


class WaitingOrders:
    """Of one link. One thread gives and takes."""

    def __init__(self) -> None:
        self._orders: list[Order] = []

    def __len__(self) -> int:
        return len(self._orders)

    def add(self, order: Order) -> None:
        """Waits for the next call of its step. Those of other steps are stale: where no call comes, none pile up."""
        if self._orders and self._orders[-1].step_id != order.step_id:
            self._orders.clear()
        self._orders.append(order)

    def take(self, call: LayerCall) -> bytes:
        """Frames of those that are for later layers of the call's step; the others are stale, and forgotten."""
        if not self._orders:
            return b""
        orders, self._orders = self._orders, []
        frames = b"".join(
            encode_order(order) for order in orders if order.step_id == call.step_id and order.layer > call.layer
        )
        return frames if len(frames) <= MAX_BYTES else b""
