"""The router's own gRPC server: inference, control, health and reflection on one port."""

from __future__ import annotations

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.api.frontend import Frontend
from cluster.api.servicer import ControlServicer, InferenceServicer, add_inference_servicer
from cluster.config import split_address
from cluster.errors import ConfigError
from cluster.rpc.v1 import control_pb2, control_pb2_grpc, inference_pb2

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CONTROL = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
MAX_REQUEST_BYTES = 16 * 1024 * 1024


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
    """Listens while the router still starts, so that health checks hear NOT_SERVING instead of nothing."""

    def __init__(self, frontend: Frontend, health_service: Health) -> None:
        self._server = grpc.aio.server(
            options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MAX_REQUEST_BYTES))
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
                bound: int = self._server.add_insecure_port(f"{host}:{port + offset}")
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

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets running ones finish for ``grace_s`` seconds, then cancels them."""
        await self._server.stop(grace_s)
