"""Ports of this machine: is one free, find one, wait for one."""

from __future__ import annotations

import socket
import time

from cluster.config import split_address
from cluster.core import Deadline
from cluster.errors import ConfigError


def check_port(listen: str) -> None:
    """Raises ConfigError when ``host:port`` cannot be bound now."""
    host, port = split_address("listen", listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as exc:
            raise ConfigError(
                f"listen: got {listen!r}; {exc.strerror or exc}; choose another port with --listen HOST:PORT"
            ) from exc


def free_port() -> int:
    """A port of the loopback interface that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(listen: str, timeout_s: float) -> None:
    """Waits until Serve's gRPC port answers: a proxy opens it on its own time, if Serve was started with one.

    Raises:
        ConfigError: it does not within ``timeout_s``.
    """
    _, port = split_address("listen", listen)
    deadline = Deadline.after(timeout_s)
    while not deadline.expired():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ConfigError(
        f"front_door: Serve opened no gRPC port {port} within {timeout_s:g} s; if Serve ran on this cluster before, it "
        "keeps the ports it was started with: use --front-door router, or shut Serve down first"
    )
