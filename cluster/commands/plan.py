"""`expertmesh plan`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.commands.common import Json, emit, stdout
from cluster.errors import InvalidArgument

_SHOWN = 12


def plan(
    loads: Annotated[Path, typer.Option(help="Load windows, as `loads record` writes them.")],
    groups: Annotated[int, typer.Option(help="Expert groups.")],
    slots: Annotated[int, typer.Option(help="Physical experts of a layer, over all groups; a multiple of --groups.")],
    hosts: Annotated[int, typer.Option(help="Hosts, each with as many groups; 0: every group is its own.")] = 0,
    expert_groups: Annotated[int, typer.Option(help="The model's own groups of consecutive experts.")] = 1,
    mode: Annotated[
        str,
        typer.Option(help="balanced: EPLB's algorithm. survivable: two hosts for every expert, and few moves."),
    ] = "balanced",
    current: Annotated[Path | None, typer.Option(help="The plan in use, as --json wrote it.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Window to plan from; by default the last that has a next one.")
    ] = None,
    expert_bytes: Annotated[
        int, typer.Option(help="Bytes of an expert, where the loads do not say; 0: not known.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Plan which group holds which experts, and audit the plan: balance on the loads it was made from and on the next
    ones, bytes to move, and what dies with each host."""
    from cluster.placement import audit
    from cluster.placement.eplb import balanced
    from cluster.placement.shape import Shape
    from cluster.placement.survivable import survivable
    from cluster.placement.windows import read_plan, read_windows

    if mode not in ("balanced", "survivable"):
        raise InvalidArgument("--mode", mode, "must be balanced or survivable")
    windows, sizes = read_windows(loads)
    number = max(0, len(windows) - 2) if window is None else window
    if not 0 <= number < len(windows):
        raise InvalidArgument("--window", number, f"must be from 0 to {len(windows) - 1}")
    loads_LE = windows[number]
    following = windows[number + 1] if number + 1 < len(windows) else None
    layers, experts = loads_LE.shape
    shape = Shape(experts, slots, groups, hosts or groups)
    current_LS = None if current is None else read_plan(current, layers, experts, slots)
    started_s = time.perf_counter()
    if mode == "balanced":
        slots_LS = balanced(loads_LE, shape, expert_groups)
    else:
        slots_LS = survivable(loads_LE, shape, current_LS)
    plan_ms = (time.perf_counter() - started_s) * 1e3
    moved = audit.moves(current_LS, slots_LS, shape)
    each = sizes or [expert_bytes or 1] * layers
    lost = audit.coverage(loads_LE, slots_LS, shape)
    result: dict[str, Any] = {
        "mode": mode,
        "layers": layers,
        "experts": experts,
        "slots": slots,
        "groups": groups,
        "hosts": shape.hosts,
        "phy2log": slots_LS.tolist(),
        "window": number,
        "balancedness_per_group": audit.balancedness_per_group(loads_LE, slots_LS, shape),
        "balancedness_per_slot": audit.balancedness_per_slot(loads_LE, slots_LS),
        "balancedness_per_group_next": None
        if following is None
        else audit.balancedness_per_group(following, slots_LS, shape),
        "balancedness_per_slot_next": None if following is None else audit.balancedness_per_slot(following, slots_LS),
        "moves": sum(moved),
        "bytes_moved": sum(count * size for count, size in zip(moved, each, strict=True)),
        "expert_bytes_known": bool(sizes or expert_bytes),
        "coverage": [
            {
                "host": loss.host,
                "groups": list(loss.groups),
                "experts_lost": len(loss.experts),
                "experts": [[expert.layer, expert.expert] for expert in loss.experts],
                "traffic_share": loss.share,
            }
            for loss in lost
        ],
        "plan_ms": plan_ms,
    }
    if as_json:
        emit(result)
    else:
        _show(result, current is not None)


def _show(result: dict[str, Any], has_current: bool) -> None:
    phy2log, groups = result["phy2log"], result["groups"]
    each = result["slots"] // groups
    table = Table("layer", *(f"group {group}" for group in range(min(groups, _SHOWN))), "per group", "per slot", "next")
    following = result["balancedness_per_group_next"]
    for layer, slots in enumerate(phy2log[:_SHOWN]):
        held = [sorted(slots[group * each : (group + 1) * each]) for group in range(min(groups, _SHOWN))]
        balance = [result[key][layer] for key in ("balancedness_per_group", "balancedness_per_slot")]
        later = f"{following[layer]:.3f}" if following else "-"
        cells = [" ".join(str(expert) for expert in experts) for experts in held]
        table.add_row(str(layer), *cells, *(f"{value:.3f}" for value in balance), later)
    stdout.print(table)
    if len(phy2log) > _SHOWN or groups > _SHOWN:
        stdout.print(f"the first {_SHOWN} layers and groups are shown; --json has all")
    means = [("this window", result["balancedness_per_group"])] + ([("the next", following)] if following else [])
    for name, values in means:
        stdout.print(f"balance on {name}: {sum(values) / len(values):.4f} (mean over maximum of the groups' tokens)")
    unit = "bytes" if result["expert_bytes_known"] else "experts"
    from_what = "from the current plan" if has_current else "from nothing"
    stdout.print(f"to load, {from_what}: {result['bytes_moved']:,} {unit}; planned in {result['plan_ms']:.1f} ms")
    audit = Table("if this host dies", "groups", "experts lost", "of the tokens")
    for loss in result["coverage"]:
        shown = ", ".join(str(group) for group in loss["groups"])
        audit.add_row(str(loss["host"]), shown, str(loss["experts_lost"]), f"{loss['traffic_share']:.1%}")
    stdout.print(audit)
