"""`expertmesh numa`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.commands.common import Json, emit, stdout
from cluster.errors import InvalidArgument
from cluster.placement.numa import SYSFS, Topology, format_list, read_topology
from cluster.placement.seats import SeatPlan, plan_seats


def show(
    sysfs: Annotated[Path, typer.Option(help="Root of a sysfs tree; another machine's copy will do.")] = SYSFS,
    groups: Annotated[
        int | None, typer.Option(help="Expert groups to plan for; default: one a GPU beside the router's, or 2.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the machine's nodes, cores and GPUs, and where router and groups would sit."""
    if not (sysfs / "devices/system/cpu").is_dir():
        raise InvalidArgument("--sysfs", str(sysfs), "must be a sysfs root, with devices/system/cpu in it")
    topology = read_topology(sysfs)
    if groups is None:
        groups = max(1, len(topology.gpus) - 1) if topology.gpus else 2
    if not 0 <= groups <= 4096:
        raise InvalidArgument("--groups", groups, "must be from 0 to 4096")
    plan = plan_seats(topology, groups)
    if as_json:
        emit(_as_json(topology, plan))
    else:
        _show(topology, plan)


def _as_json(topology: Topology, plan: SeatPlan) -> dict[str, Any]:
    return {
        "nodes": [
            {
                "node": node.node,
                "cpus": list(node.cpus),
                "physical_cores": len(topology.cores_of(node.node)),
                "memory_bytes": node.memory_bytes,
                "distances": {str(other): distance for other, distance in node.distances.items()},
                "gpus": [gpu.pci for gpu in topology.gpus if gpu.node == node.node],
            }
            for node in topology.nodes
        ],
        "cores": [{"cpus": list(core.cpus), "node": core.node, "package": core.package} for core in topology.cores],
        "gpus": [{"pci": gpu.pci, "node": gpu.node, "vendor": gpu.vendor} for gpu in topology.gpus],
        "quota_cpus": topology.quota_cpus,
        "plan": [
            {
                "role": seat.role,
                "node": seat.node,
                "memory_node": seat.memory_node,
                "cpus": list(seat.cpus),
                "threads": seat.threads,
                "gpu": seat.gpu,
                "shared": seat.shared,
            }
            for seat in plan.seats
        ],
        "bind": plan.bind,
        "notes": list(plan.notes),
    }


def _show(topology: Topology, plan: SeatPlan) -> None:
    table = Table("node", "CPUs", "cores", "memory", "distances", "GPUs")
    for node in topology.nodes:
        table.add_row(
            str(node.node),
            format_list(node.cpus) or "none",
            str(len(topology.cores_of(node.node))),
            f"{node.memory_bytes / 1024**3:.1f} GiB" if node.memory_bytes else "none",
            " ".join(str(distance) for distance in node.distances.values()),
            ", ".join(gpu.pci for gpu in topology.gpus if gpu.node == node.node),
        )
    stdout.print(table)
    seats = Table("process", "node", "memory", "CPUs", "threads", "GPU")
    for seat in plan.seats:
        seats.add_row(
            seat.role,
            str(seat.node) if seat.node >= 0 else "unknown",
            str(seat.memory_node) if seat.memory_node >= 0 else "unknown",
            (format_list(seat.cpus) or "any") + (" (shared)" if seat.shared else ""),
            str(seat.threads),
            seat.gpu or "",
        )
    stdout.print(seats)
    for note in plan.notes:
        stdout.print(note, highlight=False)
