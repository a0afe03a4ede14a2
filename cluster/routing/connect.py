"""Makes a router's links: the gRPC handshake first, then whatever both ends say they can do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cluster.core import Deadline, GroupInfo
from cluster.errors import ConfigError
from cluster.rpc.v1 import links_pb2
from cluster.settings import SecurityConfig
from cluster.transport import collective
from cluster.transport.base import Transport
from cluster.transport.choice import AUTO, BASE, End, candidates, explain
from cluster.transport.gpus import path_between, pci_address
from cluster.transport.grpc_link import GrpcTransport
from cluster.transport.link import Link
from cluster.transport.shm import ShmTransport


@dataclass(frozen=True, slots=True)
class Connector:
    """Called with a group's info, makes the link to it. ``wanted(group)`` names its transport or "auto"."""

    hello: links_pb2.Hello
    wanted: Callable[[int], str]
    device: torch.device
    payload_timeout_s: float
    security: SecurityConfig = field(default_factory=SecurityConfig)

    def __call__(self, info: GroupInfo, deadline: Deadline) -> Link:
        """The link.

        Raises:
            LinkBroken: nobody answers there in time.
            LinkRefused: the group serves another model, or belongs to another cluster.
            ConfigError: the transport that was asked for cannot be had between these two, whatever happens.
        """
        base = GrpcTransport(info.group, info.address, self.hello, deadline, security=self.security)
        welcome, wanted = base.welcome, self.wanted(info.group)
        own = End(self.device.type, pci_address(self.device), frozenset(collective.available()), shm=True)
        theirs = End(welcome.device, welcome.gpu, frozenset(welcome.collectives), bool(welcome.shm_socket))
        path = path_between(own.gpu, theirs.gpu) if own.gpu and theirs.gpu else ""
        trusted = not self.security.tls or self.security.trust_network
        found, reasons = candidates(wanted, own, theirs, path, trusted)
        if not found and wanted not in (AUTO, BASE):
            base.close()
            raise ConfigError(
                f"data_plane.transport: got {wanted!r} for group {info.group}; {explain(reasons)}; use auto"
            )

        def make(kind: str, limit: Deadline) -> Transport:
            if kind == "shm":
                return ShmTransport(info.group, welcome.shm_socket, self.hello, limit)
            payload = "" if kind == BASE else kind
            return GrpcTransport(
                info.group,
                info.address,
                self.hello,
                limit,
                payload,
                self.payload_timeout_s,
                self.device,
                self.security,
            )

        return Link(base, wanted, found, reasons, make)
