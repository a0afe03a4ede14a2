"""`expertmesh drill`."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.config import EMBEDDED_MODEL, load_config
from cluster.errors import ConfigError, InvalidArgument

_WINDOW_S = 4.0
"""Of loads: drills are short."""


def drill(
    kind: Annotated[
        str,
        typer.Argument(
            help="kill-group, hang-group, slow-group, flap-group, drop-link, kill-coordinator, kill-controller, "
            "kill-router, scale or rebalance."
        ),
    ],
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = EMBEDDED_MODEL,
    groups: Annotated[
        int | None, typer.Option(help="Expert groups; 3 by default, and 2 for rebalance: not more than cores.")
    ] = None,
    copies: Annotated[
        int | None, typer.Option(help="Groups that hold each expert; 2 by default, and 1 for rebalance.")
    ] = None,
    routers: Annotated[int | None, typer.Option(help="Routers; 2 for kill-router, else 1, by default.")] = None,
    group: Annotated[int, typer.Option(help="The group that is damaged.")] = 1,
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 8,
    new: Annotated[int, typer.Option(help="New tokens a request.")] = 48,
    before: Annotated[
        float | None, typer.Option(help="Seconds of load before the damage; 20 for rebalance, else 10, by default.")
    ] = None,
    damage: Annotated[float, typer.Option(help="Seconds that the damage lasts.")] = 6.0,
    after: Annotated[float, typer.Option(help="Seconds in which throughput must be back.")] = 60.0,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; a fresh one by default.")] = None,
    transport: Annotated[str, typer.Option(help="auto, shm, grpc or gloo.")] = "auto",
    address: Annotated[str, typer.Option(help="Ray cluster to join; a local one is started by default.")] = "",
    server: Annotated[
        str | None, typer.Option(help="HOST:PORT of a server on this machine that runs already, instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Damage a system under steady load of known answers, and report what its clients saw.

    Exit status 0 only if no request failed, no token differs, and gaps between tokens stayed within the kind's limits.
    """
    from cluster import app as composition
    from cluster.bench import drill as drills
    from cluster.bench.damage import KINDS, needs_cluster
    from cluster.plan import make_plan

    if kind not in KINDS:
        raise InvalidArgument("KIND", kind, f"must be one of {', '.join(KINDS)}")
    damage_kind = KINDS[kind]
    number = secrets.randbits(31) if seed is None else seed
    work = drills.Work(
        streams=streams,
        new=new,
        before=damage_kind.before_s if before is None else before,
        damage=damage,
        after=after,
        seed=number,
    )
    with stopping() as stop, reporting() as progress:
        if server is not None:
            if needs_cluster(damage_kind):
                raise ConfigError(f"--server: {kind} reaches processes through Ray; let the drill start the system")
            system = drills.System(server.split(","), _nobody, _nobody, lambda _group: None)
            report = drills.run(damage_kind, system, model, work, group, progress)
        else:
            flags: dict[str, Any] = {
                "model": str(model),
                "groups": groups or damage_kind.groups,
                "copies": copies or (1 if damage_kind.must_improve else 2),
                "routers": routers or damage_kind.routers,
                "dtype": "fp32",
                "address": address,
                "listen": "127.0.0.1:0",
                "data_plane": {"transport": transport},
                "placement": {"window_s": _WINDOW_S},
            }
            settings = load_config(flags=flags)
            with composition.RaySession(settings, progress), tempfile.TemporaryDirectory() as scratch:
                stop.arm()
                if damage_kind.must_improve:
                    file = Path(scratch) / "plan.json"
                    with _served(composition, make_plan(settings), progress) as deployment:
                        plan = drills.skewed_plan(deployment.addresses, work, groups or damage_kind.groups, progress)
                    file.write_text(json.dumps({"phy2log": plan}), encoding="utf-8")
                    settings = load_config(flags={**flags, "placement": {"window_s": _WINDOW_S, "plan": str(file)}})
                with _served(composition, make_plan(settings), progress) as deployment:
                    system = drills.System(
                        deployment.addresses,
                        composition.coordinator_pid,
                        composition.controller_pid,
                        composition.drop_links,
                    )
                    report = drills.run(damage_kind, system, model, work, group, progress)
    if as_json:
        emit(report)
    else:
        _show(report)
    if not report["pass"]:
        raise typer.Exit(1)


@contextmanager
def _served(composition: Any, plan: Any, progress: Any) -> Iterator[Any]:
    deployment = composition.deploy(plan, progress)
    try:
        yield deployment
    finally:
        deployment.remove()


def _nobody() -> int:
    raise ConfigError("--server: coordinator and controller cannot be reached without Ray")


def _show(report: dict[str, Any]) -> None:
    p99 = {name: "-" if value is None else f"{value:.0f}" for name, value in report["token_gap_p99_ms"].items()}
    recovery = "never" if report["recovery_s"] is None else f"after {report['recovery_s']:.1f} s"
    stdout.print(
        f"{report['requests']} requests, {report['failed']} failed, {report['mismatched_tokens']} tokens differ\n"
        f"gaps between tokens: longest {report['max_token_gap_ms']:.0f} ms (before: "
        f"{report['max_token_gap_before_ms']:.0f}), p99 {p99['during']} ms (before: {p99['before']}, after: "
        f"{p99['after']})\n"
        f"throughput back {recovery}; {report['resumed_streams']} streams resumed; "
        f"{report['resent_calls']} calls sent again, {report['hedges']} twice "
        f"({report['hedged_share']:.1%})"
    )
    stdout.print("[green]pass[/green]" if report["pass"] else f"[red]fail[/red]: {'; '.join(report['problems'])}")
