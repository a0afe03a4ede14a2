"""The router's own gRPC server: inference, control, health and reflection on one port."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.api.frontend import Frontend
from cluster.api.gate import Gate
from cluster.api.servicer import ControlServicer, InferenceServicer, add_inference_servicer
from cluster.api.tokens import TokenFile
from cluster.config import split_address
from cluster.errors import ConfigError
from cluster.rpc.v1 import control_pb2, control_pb2_grpc, inference_pb2
from cluster.settings import SecurityConfig
from cluster.telemetry.metrics import Gauge
from cluster.transport.credentials import client_server

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
MAX_REQUEST_BYTES = 16 * 1024 * 1024
MAX_METADATA_BYTES = 16 * 1024
MAX_STREAMS = 4096
"""Calls of one connection at a time; more wait in the client."""
IDLE_MS = 15 * 60 * 1000
"""A connection without calls for so long is closed; clients make it anew when they need it."""


class Health:
    """grpc.health.v1 for the whole server ("") and the inference service."""

    def __init__(self) -> None:
        self.servicer: Any = health.aio.HealthServicer()
        self._serving = False

    async def set(self, serving: bool) -> None:
        """SERVING or NOT_SERVING."""
        self._serving = serving
        for service in ("", INFERENCE):
            await self.servicer.set(service, self.status(service))

    def status(self, service: str) -> Any:
        """Status of a service, None for one that is not known."""
        if service not in ("", INFERENCE):
            return None
        known = health_pb2.HealthCheckResponse
        return known.SERVING if self._serving else known.NOT_SERVING


class ClientServer:
    """Listens while the router still starts, so that health checks hear NOT_SERVING instead of nothing.

    Raises (constructor):
        ConfigError: certificates or tokens cannot be used.
    """

    def __init__(self, frontend: Frontend, health_service: Health, security: SecurityConfig | None = None) -> None:
        security = security or SecurityConfig()
        self._certificates = client_server(security)
        self._tokens = TokenFile(security.tokens) if security.tokens else None
        self._gate = Gate(self._tokens)
        self._server = grpc.aio.server(
            interceptors=(self._gate,),
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
                ("grpc.max_metadata_size", MAX_METADATA_BYTES),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.max_allowed_incoming_connections", security.max_connections),
                ("grpc.server_handshake_timeout_ms", int(1e3 * security.handshake_s)),
                ("grpc.max_connection_idle_ms", IDLE_MS),
            ),
        )
        add_inference_servicer(InferenceServicer(frontend), self._server)
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(frontend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(health_service.servicer, self._server)
        reflection.enable_server_reflection(
            (INFERENCE, CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    async def start(self, listen: str, routers: int = 1) -> int:
        """Binds ``host:port`` and answers from now on; returns the port. Of several routers on a host each takes the
        first port from there on that is free, within as many as there are routers.

        Raises:
            ConfigError: the ports are in use, or the interface is not this machine's.
        """
        host, port = split_address("listen", listen)
        for offset in range(routers if port else 1):
            try:
                bound = self._bind(f"{host}:{port + offset}")
            except RuntimeError as exc:
                if offset + 1 < routers and port:
                    continue
                ports = "the port is" if routers == 1 else f"the {routers} ports from there on are"
                raise ConfigError(
                    f"listen: got {listen!r}; {ports} in use or the interface is not this machine's"
                ) from exc
            break
        await self._server.start()
        return bound

    def _bind(self, address: str) -> int:
        if self._certificates is None:
            bound: int = self._server.add_insecure_port(address)
        else:
            bound = self._server.add_secure_port(address, self._certificates.credentials())
        return bound

    def status(self) -> control_pb2.SecurityStatus:
        """Who may come in, and how many could not."""
        certificates, tokens = self._certificates, self._tokens
        return control_pb2.SecurityStatus(
            tls=certificates is not None,
            client_certificates=certificates is not None and certificates.mutual,
            tokens=tokens is not None,
            refused=dict(self._gate.refused),
            certificate_reloads=certificates.reloads if certificates is not None else 0,
            certificate_failures=certificates.failures if certificates is not None else 0,
            tokens_problem=tokens.problem if tokens is not None else "",
        )

    def gauges(self) -> list[Gauge]:
        """For whoever reads metrics."""
        return [
            Gauge(
                "moe.door.refused",
                "{call}",
                "Calls that did not come in at the client port.",
                lambda: [({"code": code}, float(count)) for code, count in self._gate.refused.items()],
                counts=True,
            )
        ]

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones finish for ``grace_s`` seconds, then cancels them."""
        await self._server.stop(grace_s)
