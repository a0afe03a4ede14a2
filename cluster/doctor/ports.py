"""Checks of what a configuration wants to listen on, and of what Ray shows to whom."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from cluster.api.ports import check_port
from cluster.config import Config, split_address
from cluster.doctor.findings import FAIL, OK, WARN, Finding
from cluster.errors import ConfigError
from cluster.settings import LOOPBACK


def check_ports(config: Config) -> Iterator[Finding]:
    """Ports free, and nothing open to the network by accident."""
    host, port = split_address("listen", config.listen)
    for offset in range(config.routers if port else 1):
        address = f"{host}:{port + offset}"
        try:
            check_port(address)
            yield Finding("ports", OK, f"{address} is free")
        except ConfigError as exc:
            remedy = "it may be a server that runs already: see `expertmesh status`, or use another --listen"
            yield Finding("ports", FAIL, str(exc), remedy)
    if host not in LOOPBACK:
        if not config.security.tls:
            yield Finding("exposure", WARN, f"{config.listen} takes plain text from the network", "set security.cert")
        if not (config.security.tokens or config.security.client_ca):
            yield Finding("exposure", WARN, f"{config.listen} takes everybody", "set security.tokens or client_ca")
    if config.data_plane.bind not in LOOPBACK and not config.security.tls:
        found = f"links on {config.data_plane.bind} are plain text, and so is the cluster secret on them"
        yield Finding("exposure", WARN, found, "set security.cert, key and ca, or use a network of their own")
    if config.front_door == "serve":
        found = f"Serve's ingress takes plain text from everybody on all interfaces, port {port}"
        yield Finding("exposure", WARN, found, "use --front-door router, or a firewall")
    metrics = config.telemetry.metrics_listen
    if metrics not in ("auto", "off") and split_address("telemetry.metrics_listen", metrics)[0] not in LOOPBACK:
        yield Finding("exposure", WARN, f"{metrics} shows metrics to everybody", "put a proxy or a firewall in front")
    try:
        socket.getaddrinfo(socket.gethostname(), None)
        yield Finding("name", OK, f"{socket.gethostname()} resolves")
    except OSError as exc:
        found = f"{socket.gethostname()} does not resolve: {exc}"
        yield Finding("name", WARN, found, "add it to /etc/hosts: gloo and NCCL look it up")


def check_ray(address: str) -> Iterator[Finding]:
    """What whoever reaches Ray's ports may do: run any code."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        yield Finding("ray_token", OK, "RAY_AUTH_MODE=token")
    elif address:
        remedy = (
            "start Ray with RAY_AUTH_MODE=token (`ray get-auth-token --generate`): without, who reaches it runs code"
        )
        yield Finding("ray_token", WARN, "RAY_AUTH_MODE is not token", remedy)
