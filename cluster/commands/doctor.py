"""`expertmesh doctor`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Annotated, Any

import typer
from rich.table import Table

from cluster.commands.common import ConfigFile, Json, emit, reporting, stdout
from cluster.config import load_config

_COLOUR = {"ok": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def doctor(
    config: ConfigFile = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster whose hosts are checked, each by itself; else this machine.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a machine or a cluster, and say what to do. Changes nothing. Exit status 1 if something will not work."""
    settings = load_config(config, {"address": address})
    from cluster.doctor.machine import check_machine
    from cluster.doctor.ports import check_ports, check_ray

    findings = [*check_ports(settings), *check_ray(settings.address)]
    if settings.address:
        from cluster import app as composition
        from cluster.doctor.hosts import check_hosts

        with reporting() as progress, composition.RaySession(settings, progress, only_ray=True):
            progress("asking every host")
            findings += check_hosts(settings.security)
    else:
        findings += check_machine(settings.security)
    counts = Counter(finding.state for finding in findings)
    if as_json:
        result: dict[str, Any] = {
            "ok": not counts["fail"],
            "counts": {state: counts[state] for state in _COLOUR},
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }
        emit(result)
    else:
        table = Table("host", "check", "state", "found", "what to do", box=None, pad_edge=False)
        for finding in findings:
            colour = _COLOUR[finding.state]
            state = f"[{colour}]{finding.state}[/{colour}]"
            table.add_row(finding.host or "here", finding.check, state, finding.found, finding.remedy)
        stdout.print(table)
        stdout.print(", ".join(f"{counts[state]} {state}" for state in _COLOUR if counts[state]))
    if counts["fail"]:
        raise typer.Exit(1)
