"""`expertmesh status`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.commands.common import DEFAULT_SERVER, Json, Server, emit, stdout

if TYPE_CHECKING:
    from cluster.rpc.v1 import control_pb2


def status(
    server: Server = DEFAULT_SERVER,
    rebalances: Annotated[
        bool, typer.Option("--rebalances", help="Changes of the placement so far, and what came of each.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show groups, experts, memory, placement table and engine of a running server."""
    from cluster.api.client import Client
    from cluster.commands.placement import show_placement

    with Client(server, timeout_s=10) as client:
        if rebalances:
            show_placement(client.placement(), as_json)
            return
        reply = client.status()
    if as_json:
        emit(as_numbers(reply))
        return
    _status_table(reply)


def _link(group: control_pb2.GroupStatus) -> str:
    link = group.link
    text = f"{group.transport or 'no link'}, because {link.why}" if link.why else group.transport
    counts = [
        (link.fallbacks, "fell back to gRPC"),
        (link.returns, "came back"),
        (link.reconnects, "made anew"),
    ]
    told = ", ".join(f"{word} {count} x" for count, word in counts if count)
    if link.last_failure:
        told += f"; last failure {link.last_failure_age_s:.0f} s ago: {link.last_failure}"
    return f"{text} ({told})" if told else text


def _place(process: control_pb2.ProcessStatus) -> str:
    ratio = f", {process.numa_local_ratio:.0%} of its memory there" if process.HasField("numa_local_ratio") else ""
    return f"on node {process.numa_node}{ratio}" if process.numa_node >= 0 else "not bound"


def _phases(process: control_pb2.ProcessStatus) -> str:
    return ", ".join(f"{phase.name} {phase.seconds:.1f} s" for phase in process.startup)


def as_numbers(message: Any) -> dict[str, Any]:
    """A proto as JSON, with numbers as numbers."""
    from google.protobuf.json_format import MessageToDict

    result = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    found: dict[str, Any] = _numbers(result)
    return found


def _numbers(value: Any) -> Any:
    """64-bit integers, which protobuf writes as JSON strings, as numbers again."""
    if isinstance(value, dict):
        return {key: _numbers(item) if key not in _TEXT_KEYS else item for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return int(value) if isinstance(value, str) and value.isdigit() else value


_TEXT_KEYS = frozenset(
    {
        "incarnation",
        "host",
        "visible_devices",
        "model",
        "address",
        "uncovered_experts",
        "arch",
        "why",
        "last_failure",
        "wanted",
        "transport",
        "metrics_address",
        "traces",
        "kind",
        "state",
        "problem",
        "autoscale_why",
    }
)


def _status_table(reply: control_pb2.StatusReply) -> None:
    mib = 1024**2
    stdout.print(
        f"[bold]{reply.state}[/bold]  {reply.model} ({reply.arch}, {reply.dtype})  "
        f"table {reply.table_epoch}.{reply.table_version}  up {reply.uptime_s:.0f} s"
    )
    if reply.uncovered_experts:
        stdout.print(f"[red]{len(reply.uncovered_experts)} experts without a living copy[/red]")
    table = Table("process", "pid", "device", "link", "experts", "weights", "memory", "calls", "state")
    for column in table.columns:
        column.no_wrap = True
    router = reply.router
    table.add_row(
        "router",
        str(router.pid),
        router.device + (f" [{router.visible_devices}]" if router.visible_devices else ""),
        "",
        "",
        f"{reply.trunk_bytes / mib:.1f} M",
        f"{router.rss_bytes / mib:.0f} M",
        "",
        reply.state,
    )
    for group in reply.groups:
        counts = [len(layer.experts) for layer in group.holdings]
        spread = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"
        table.add_row(
            f"group {group.group}",
            str(group.process.pid),
            group.process.device + (f" [{group.process.visible_devices}]" if group.process.visible_devices else ""),
            group.transport,
            f"{spread} x {len(counts)}",
            f"{group.expert_bytes / mib:.1f} M",
            f"{group.process.rss_bytes / mib:.0f} M",
            str(group.calls),
            "up" if group.healthy else "[red]down[/red]",
        )
    stdout.print(table)
    for group in reply.groups:
        stdout.print(f"group {group.group}: {_link(group)}", markup=False)
        if group.HasField("store"):
            store = group.store
            stdout.print(
                f"  experts: {store.resident} in memory, {store.capacity} fit {store.budget_bytes / mib:.0f} MiB; "
                f"{store.loads} loads ({store.loads_s:.1f} s), "
                f"{sum(store.stalls)} calls waited {store.stalled_s:.1f} s; "
                f"{store.ahead} loaded ahead, of those {sum(store.hits)} in time for a call, "
                f"{sum(store.wasted_bytes) / mib:.0f} MiB for nothing",
                markup=False,
            )
    starts = [("router", reply.router), *((f"group {g.group}", g.process) for g in reply.groups)]
    phases = "; ".join(f"{name} {_phases(process)}" for name, process in starts if process.startup)
    if phases:
        stdout.print(f"start: {phases}", markup=False)
    numa = [("router", reply.router), *((f"group {g.group}", g.process) for g in reply.groups)]
    places = ", ".join(f"{name} {_place(process)}" for name, process in numa)
    stdout.print(f"NUMA: {places}", markup=False)
    engine = reply.engine
    stdout.print(
        f"engine: {engine.running} running, {engine.waiting} waiting, {engine.finished} finished, {engine.cancelled} "
        f"cancelled, {engine.failed} failed; {engine.steps} steps, largest batch {engine.max_batch}; "
        f"key-value cache {engine.kv_used_bytes / mib:.1f} of {engine.kv_limit_bytes / mib:.0f} MiB"
    )
    if reply.HasField("security"):
        stdout.print(f"client port: {_door(reply)}", markup=False)
    told = reply.telemetry
    where = (", ".join(told.traces) or "nowhere") + ("" if told.tracing else ", switched off")
    metrics = f"http://{told.metrics_address}/metrics" if told.metrics_address else "off"
    stdout.print(
        f"traces: {where}; {told.spans_exported} spans exported, {told.spans_dropped} dropped; metrics: {metrics}",
        markup=False,
    )


def _door(reply: control_pb2.StatusReply) -> str:
    """Who may come in, and how many could not."""
    door = reply.security
    wanted = [
        "TLS" if door.tls else "plain text",
        *(["clients' certificates"] if door.client_certificates else []),
        "tokens" if door.tokens else "no tokens",
    ]
    refused = ", ".join(f"{count} {code}" for code, count in sorted(door.refused.items()))
    links = sum(group.refused_links for group in reply.groups)
    return (
        f"{', '.join(wanted)}; refused: {refused or 'nobody'}, and {links} links at groups"
        + (f"; certificates read again {door.certificate_reloads} times" if door.certificate_reloads else "")
        + (
            f"; {door.certificate_failures} changes of certificates could not be used"
            if door.certificate_failures
            else ""
        )
        + (f"; {door.tokens_problem}" if door.tokens_problem else "")
    )
