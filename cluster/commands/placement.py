"""`expertmesh scale`, `drain` and `balance`: changes of a running server's groups and of what they hold."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.common import DEFAULT_SERVER, Json, Server, emit, reporting, stdout
from cluster.errors import ExpertMeshError, InvalidArgument, Unavailable

if TYPE_CHECKING:
    from cluster.rpc.v1 import control_pb2

_OVER = ("done", "failed", "rolled back", "nothing to do", "watching")
Timeout = Annotated[float, typer.Option(help="Seconds to wait for the change; it goes on without us.")]


def scale(
    groups: Annotated[int, typer.Option(help="Groups that shall take calls.", min=1)],
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Add groups to a running server, or drain and stop some, while it serves. No other process is restarted."""
    _change(server, timeout, as_json, groups=groups)


def drain(
    group: Annotated[int, typer.Argument(help="Group.", min=0)],
    back: Annotated[bool, typer.Option("--back", help="The drained group takes calls again.")] = False,
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Let others take over what a group holds, and send it no more calls. It stays, and holds nothing."""
    _change(server, timeout, as_json, **({"give_back": group} if back else {"drain": group}))


def balance(
    what: Annotated[str, typer.Argument(help="on, off, or now: once, by the loads of now.")],
    server: Server = DEFAULT_SERVER,
    timeout: Timeout = 600.0,
    as_json: Json = False,
) -> None:
    """Move experts between groups of a running server, so that measured loads are even."""
    from cluster.api.client import Client

    if what not in ("on", "off", "now"):
        raise InvalidArgument("WHAT", what, "must be on, off or now")
    if what == "now":
        _change(server, timeout, as_json, rebalance=True)
        return
    with Client(server, timeout_s=30) as client:
        client.change_placement(balance=what == "on")
    if as_json:
        emit({"balance": what == "on"})
    else:
        stdout.print(f"balance is {what}")


def _change(server: str, timeout_s: float, as_json: bool, **change: Any) -> None:
    from cluster.api.client import Client
    from cluster.commands.status import as_numbers

    with Client(server, timeout_s=30) as client, reporting() as progress:
        number = client.change_placement(**change)
        receipt = _wait(client, number, timeout_s, progress)
    if as_json:
        emit(as_numbers(receipt))
    else:
        _show([receipt])
    if receipt.state not in _OVER or receipt.state == "failed":
        raise typer.Exit(1)


def _wait(client: Any, number: int, timeout_s: float, progress: Any) -> control_pb2.PlacementReceipt:
    """The receipt when its change has been carried out.

    Raises:
        Unavailable: there is no such receipt, as after a restart of the coordinator, or nobody answers for a while.
    """
    until_s, said, heard_s = time.monotonic() + timeout_s, "", time.monotonic()
    while True:
        try:
            receipts = client.placement().receipts
            heard_s = time.monotonic()
        except ExpertMeshError:
            if time.monotonic() - heard_s > 30.0:
                raise
            receipts = None
        if receipts is not None:
            found: control_pb2.PlacementReceipt | None = next((r for r in receipts if r.number == number), None)
            if found is None:
                raise Unavailable(
                    f"change {number} is not known any more; `expertmesh status --rebalances` shows others"
                )
            if found.state in _OVER or time.monotonic() >= until_s:
                return found
            if found.state != said:
                said = found.state
                progress(f"{found.why}: {said}")
        time.sleep(0.5)


def show_placement(reply: control_pb2.PlacementReply, as_json: bool) -> None:
    """What `status --rebalances` prints."""
    from cluster.commands.status import as_numbers

    if as_json:
        emit(as_numbers(reply))
        return
    _show(list(reply.receipts))
    for router in reply.routers:
        drains = ", drains" if router.draining else ""
        stdout.print(f"router {router.address}: pid {router.pid} on {router.host}, {router.live} requests{drains}")
    why = f" ({reply.autoscale_why})" if reply.autoscale_why else ""
    scaling = f"{reply.autoscale_min} to {reply.autoscale_max} groups{why}" if reply.autoscale_max else "off"
    now = f"{reply.balance_now:.2f}" if reply.HasField("balance_now") else "not known yet"
    drained = f"; drained groups: {', '.join(map(str, reply.drained))}" if reply.drained else ""
    stdout.print(
        f"balance {'on' if reply.balance else 'off'}, now {now} over {reply.windows} windows of {reply.window_s:g} s; "
        f"autoscale {scaling}{drained}"
    )


def _show(receipts: list[control_pb2.PlacementReceipt]) -> None:
    """Two lines each; a table would be too wide."""
    for receipt in receipts:
        balances = [_value(receipt, f"balance_{name}", ".2f") for name in ("before", "predicted", "measured")]
        gaps = [_value(receipt, f"gap_p99_ms_{name}", ".0f") for name in ("before", "during", "after")]
        took = f", {receipt.duration_s:.1f} s" if receipt.duration_s else ""
        problem = f": {receipt.problem}" if receipt.problem else ""
        stdout.print(f"{receipt.number} {receipt.kind}, {receipt.why}: {receipt.state}{took}{problem}", markup=False)
        stdout.print(
            f"  copies +{receipt.copies_loaded} -{receipt.copies_dropped}, {receipt.bytes_loaded:,} bytes; balance "
            f"before, planned, after: {', '.join(balances)}; gap p99 before, during, after: {', '.join(gaps)} ms",
            markup=False,
        )
    if not receipts:
        stdout.print("no change of the placement so far")


def _value(receipt: control_pb2.PlacementReceipt, name: str, form: str) -> str:
    return format(getattr(receipt, name), form) if receipt.HasField(name) else "-"  # type: ignore[arg-type]
