"""`expertmesh serve` and `expertmesh stop`."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.common import ConfigFile, Json, emit, reporting, stderr, stopping
from cluster.config import load_config
from cluster.errors import ConfigError


def serve(
    model: Annotated[str | None, typer.Option(help="Checkpoint directory; the embedded model by default.")] = None,
    groups: Annotated[int | None, typer.Option(help="Expert groups; 0 keeps all experts in the router.")] = None,
    copies: Annotated[int | None, typer.Option(help="Groups that hold each expert; 2: any one may die.")] = None,
    routers: Annotated[
        int | None, typer.Option(help="Routers, each with the trunk and a port of its own, from --listen on.")
    ] = None,
    placement: Annotated[
        Path | None, typer.Option("--plan", help="Placement to start with, as `plan --json` wrote it.")
    ] = None,
    balance: Annotated[
        bool | None, typer.Option("--balance/--no-balance", help="Move experts between groups as load changes.")
    ] = None,
    autoscale: Annotated[
        str | None, typer.Option(help="MIN:MAX groups: add and remove groups by how busy they are.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join; a local one is started by default.")] = None,
    config: ConfigFile = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT for clients.")] = None,
    front_door: Annotated[str | None, typer.Option(help="router: its own gRPC server; serve: Ray Serve's.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, fp32, bf16 or fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    expert_dtype: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or int8; other weights than the served dtype's are not exact.")
    ] = None,
    transport: Annotated[
        str | None, typer.Option(help="auto, shm, grpc, nccl, gloo, inproc, or one for each group: shm,grpc.")
    ] = None,
    expert_memory: Annotated[
        str | None, typer.Option(help="Of a group, for experts in memory: all, or bytes such as 512M or 4G.")
    ] = None,
    numa: Annotated[str | None, typer.Option(help="auto, off or strict: bind processes to NUMA nodes.")] = None,
    verify: Annotated[bool | None, typer.Option("--verify", help="Let clients ask for full logits.")] = None,
    cert: Annotated[
        Path | None, typer.Option(help="PEM file with the servers' certificate: TLS for clients and on links.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file with its private key.")] = None,
    ca: Annotated[
        Path | None, typer.Option(help="PEM file: routers and groups accept each other's certificates from these.")
    ] = None,
    client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: clients must show a certificate from these (mutual TLS).")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="File of clients' bearer tokens, as `expertmesh token` writes it.")
    ] = None,
    trust_network: Annotated[
        bool | None, typer.Option("--trust-network", help="Allow gloo and NCCL, which are never encrypted, beside TLS.")
    ] = None,
) -> None:
    """Serve a model until Ctrl-C or SIGTERM, which let running requests finish."""
    flags = {
        "model": model,
        "groups": groups,
        "copies": copies,
        "routers": routers,
        "address": address,
        "listen": listen,
        "front_door": front_door,
        "dtype": dtype,
        "device": device,
        "expert_dtype": expert_dtype,
        "expert_memory": expert_memory,
        "numa": numa,
        "verify": verify,
        "data_plane": {"transport": transport},
        "placement": {
            "plan": None if placement is None else str(placement.resolve()),
            "balance": balance,
            "autoscale": autoscale,
        },
        "security": {
            "cert": _text(cert),
            "key": _text(key),
            "ca": _text(ca),
            "client_ca": _text(client_ca),
            "tokens": _text(tokens),
            "trust_network": trust_network,
        },
    }
    settings = load_config(config, flags)
    from cluster import app as composition
    from cluster.api import instances
    from cluster.api.ports import check_port
    from cluster.plan import make_plan

    check_port(settings.listen)
    with stopping() as stop, reporting() as progress:
        progress(f"checking {settings.model}")
        plan = make_plan(settings)
        with composition.RaySession(settings, progress):
            stop.arm()  # Ray has put its own handlers in place
            deployment = composition.deploy(plan, progress)
            file = None
            try:
                file = instances.announce(deployment.address)
                progress(f"serving {Path(settings.model).name} on {','.join(deployment.addresses)}; Ctrl-C stops")
                stop.wait()
                progress(f"draining: running requests have {settings.drain_s:g} s")
                left = deployment.drain(settings.drain_s)
                if left > 0:
                    progress(f"{left} requests did not finish in time")
            finally:
                progress("stopping")
                deployment.remove()
                if file is not None:
                    file.unlink(missing_ok=True)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def stop(
    server: Annotated[str | None, typer.Option("--server", help="Only the server on this HOST:PORT.")] = None,
    address: Annotated[
        str | None, typer.Option(help="Remove what is left on this Ray cluster by a `serve` that is gone.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for it to drain and end.")] = 90.0,
    as_json: Json = False,
) -> None:
    """Stop servers that `serve` started on this machine: drain, then end."""
    if address is not None:
        from cluster import app as composition

        with reporting() as progress, composition.RaySession(load_config(flags={"address": address}), progress):
            removed = composition.remove_all()
        stderr.print(f"removed: {', '.join(removed) or 'nothing'}")
        if as_json:
            emit({"stopped": removed, "running": []})
        return
    from cluster.api import instances

    targets = [item for item in instances.running() if server is None or item.address == server]
    if not targets:
        raise ConfigError("no server runs on this machine" + (f" at {server}" if server else ""))
    for item in targets:
        os.kill(item.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout
    while any(item.alive() for item in targets) and time.monotonic() < deadline:
        time.sleep(0.1)
    stuck = [item for item in targets if item.alive()]
    for item in targets:
        stderr.print(f"{item.address}: {'still draining' if item in stuck else 'stopped'} (pid {item.pid})")
    if as_json:
        emit({"stopped": [i.address for i in targets if i not in stuck], "running": [i.address for i in stuck]})
    if stuck:
        raise typer.Exit(1)
