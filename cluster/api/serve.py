"""The router's Serve shell: the second host of the front door (Serve's gRPC ingress), and the first one's process."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
import ray
from grpc_health.v1 import health_pb2
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from cluster.api.frontend import DRAINING, Frontend
from cluster.api.placement import change_of, placement_reply
from cluster.api.router import Router
from cluster.api.server import ClientServer, Health
from cluster.api.servicer import parsed
from cluster.api.status import as_known, grpc_status
from cluster.config import Config, split_address
from cluster.core import Membership
from cluster.errors import ExpertMeshError, InternalError, Unavailable
from cluster.experts.group import own_gpu
from cluster.experts.server import ALL_INTERFACES
from cluster.placement.binding import Binding
from cluster.routing.report import RouterReport
from cluster.rpc.v1 import control_pb2, inference_pb2
from cluster.telemetry import logs

FETCH_TIMEOUT_S = 5.0
LOADS_PERIOD_S = 2.0

BuildRouter = Callable[[Config, Callable[[], Membership], Binding], Router]


class RouterShell:
    """Deployment ``router`` of the application ``expertmesh``."""

    # Serve awaits constructors.
    async def __init__(  # type: ignore[misc]
        self, build: BuildRouter, config: Config, coordinator: DeploymentHandle[Any] | None, hosts: int = 1
    ) -> None:
        logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
        self._coordinator, self._listen = coordinator, config.listen
        self._name, self._router = uuid.uuid4().hex[:12], None
        self._loads_due_s = 0.0
        self._frontend, self._health = Frontend(), Health()
        self._server: ClientServer | None = None
        self._port = 0
        await self._health.set(serving=False)
        if config.front_door == "router":
            self._server = ClientServer(self._frontend, self._health, config.security)
            self._frontend.door = self._server.status
            self._port = await self._server.start(config.listen, config.routers)
        try:
            self._router = router = await asyncio.to_thread(self._build, build, config, hosts)
        except BaseException:
            if self._server is not None:
                await self._server.stop(0)
            raise
        if self._server is not None and router.telemetry is not None:
            router.telemetry.gauges(self._server.gauges())
        control = _Coordinator(coordinator) if coordinator is not None else None
        self._frontend.ready(dataclasses.replace(router.served, control=control))
        await self._health.set(serving=True)

    def _build(self, build: BuildRouter, config: Config, hosts: int) -> Router:
        """In the thread that loads everything and starts the others: they inherit its memory policy."""
        one_process = config.groups == 0 or "inproc" in config.transports()  # wants all of the machine
        mode = "off" if one_process else config.numa
        binding = Binding.of_router(mode, config.groups, own_gpu(config), hosts)
        return build(config, self._membership, binding)

    def _membership(self) -> Membership:
        coordinator, report = self._coordinator, self._report()
        assert coordinator is not None
        membership: Membership = _answer(lambda: coordinator.membership.remote(report))
        return membership

    def _report(self) -> RouterReport | None:
        """How this router is; None before it is ready."""
        router, now_s = self._router, time.monotonic()
        if router is None:
            return None
        with_loads = now_s >= self._loads_due_s
        if with_loads:
            self._loads_due_s = now_s + LOADS_PERIOD_S
        report = router.report(self._name, with_loads)
        address = self._address() if self._port else self._listen
        return dataclasses.replace(report, address=address, draining=self._frontend.state == DRAINING)

    def _address(self) -> str:
        host, _ = split_address("listen", self._listen)
        if host in ALL_INTERFACES:
            host = ray.util.get_node_ip_address()
        return f"{host}:{self._port}"

    async def door(self) -> tuple[int, str]:
        """Port and address of the router's own server; port 0 behind Serve's ingress."""
        return self._port, self._address()

    async def drain(self, grace_s: float) -> int:
        """NOT_SERVING from now on; waits for running requests, at most ``grace_s`` seconds. How many are left."""
        self._frontend.drain()
        await self._health.set(serving=False)
        ends_s = time.monotonic() + grace_s
        while self._frontend.num_live() and time.monotonic() < ends_s:
            await asyncio.sleep(0.05)
        left = self._frontend.num_live()
        await self._frontend.flush_traces()
        if self._server is not None:
            await self._server.stop(0.2)
        return left

    async def check_health(self) -> None:
        """Serve restarts a router whose engine thread is stuck."""
        assert self._router is not None
        age_s = self._router.engine.progress_age_s()
        if age_s > 300:
            raise InternalError(f"the engine made no progress for {age_s:.0f} s")

    # -- Serve's gRPC ingress: the same services, with Serve's own context ---------------------------------------------

    async def Generate(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        try:
            chunks = self._frontend.generate(parsed(request), _metadata(grpc_context), None)
            async with aclosing(chunks):
                async for chunk in chunks:
                    yield chunk
        except Exception as exc:  # noqa: BLE001 (mapped to a status; the client never sees a stack trace)
            _set_status(grpc_context, exc)
            yield inference_pb2.GenerateChunk()  # Serve carries the status with a message, and without one not at all

    async def GenerateOnce(self, request: Any, grpc_context: Any) -> Any:
        try:
            return await self._frontend.generate_once(parsed(request), _metadata(grpc_context), None)
        except Exception as exc:  # noqa: BLE001 (as above)
            _set_status(grpc_context, exc)
            return inference_pb2.GenerateReply()

    async def ModelInfo(self, request: Any, grpc_context: Any) -> Any:
        return _call(grpc_context, inference_pb2.ModelInfoReply, self._frontend.model_info)

    async def Tokenize(self, request: Any, grpc_context: Any) -> Any:
        try:
            return await self._frontend.tokenize(parsed(request))
        except Exception as exc:  # noqa: BLE001 (as above)
            _set_status(grpc_context, exc)
            return inference_pb2.TokenizeReply()

    async def Detokenize(self, request: Any, grpc_context: Any) -> Any:
        return _call(grpc_context, inference_pb2.DetokenizeReply, lambda: self._frontend.detokenize(parsed(request)))

    async def Status(self, request: Any, grpc_context: Any) -> Any:
        return await self._frontend.status()

    async def SetTracing(self, request: Any, grpc_context: Any) -> Any:
        return _call(grpc_context, control_pb2.SetTracingReply, lambda: self._frontend.set_tracing(request))

    async def SetFailOver(self, request: Any, grpc_context: Any) -> Any:
        return _call(grpc_context, control_pb2.SetFailOverReply, lambda: self._frontend.set_fail_over(request))

    async def Loads(self, request: Any, grpc_context: Any) -> Any:
        return _call(grpc_context, control_pb2.LoadsReply, self._frontend.loads)

    async def ChangePlacement(self, request: Any, grpc_context: Any) -> Any:
        try:
            return await self._frontend.change_placement(request)
        except Exception as exc:  # noqa: BLE001 (as above)
            _set_status(grpc_context, exc)
            return control_pb2.ChangePlacementReply()

    async def Placement(self, request: Any, grpc_context: Any) -> Any:
        try:
            return await self._frontend.placement()
        except Exception as exc:  # noqa: BLE001 (as above)
            _set_status(grpc_context, exc)
            return control_pb2.PlacementReply()

    async def Check(self, request: Any, grpc_context: Any) -> Any:
        status = self._health.status(request.service)
        if status is None:
            grpc_context.set_code(grpc.StatusCode.NOT_FOUND)
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncIterator[Any]:
        """Serve's context cannot write to the stream, which the library's servicer wants, so states are looked at."""
        last: Any = None
        while True:
            status = self._health.status(request.service)
            if status is None:
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            await asyncio.sleep(0.2)


@dataclass(frozen=True, slots=True)
class _Coordinator:
    """See `cluster.api.frontend.PlacementControl`."""

    handle: DeploymentHandle[Any]

    def change(self, request: control_pb2.ChangePlacementRequest) -> control_pb2.ChangePlacementReply:
        kind, value = change_of(request)
        return control_pb2.ChangePlacementReply(receipt=_answer(lambda: self.handle.change.remote(kind, value)))

    def placement(self) -> control_pb2.PlacementReply:
        return placement_reply(_answer(lambda: self.handle.placement.remote()))


def _answer(ask: Callable[[], Any]) -> Any:
    """The coordinator's answer.

    Raises:
        Unavailable: there is none.
        ExpertMeshError: what it says.
    """
    response = ask()
    try:
        return response.result(timeout_s=FETCH_TIMEOUT_S)
    except RayTaskError as exc:
        if isinstance(exc.cause, ExpertMeshError):
            raise exc.cause from None
        raise Unavailable(f"the coordinator failed: {type(exc.cause).__name__}") from exc
    except (RayError, RayServeException, TimeoutError) as exc:
        response.cancel()  # or it might be carried out later, when nobody expects it any more
        raise Unavailable(f"the coordinator does not answer: {type(exc).__name__}") from exc


def _call(grpc_context: Any, empty: Callable[[], Any], call: Callable[[], Any]) -> Any:
    """The reply, or a status with an empty one: Serve sends a message in any case."""
    try:
        return call()
    except Exception as exc:  # noqa: BLE001 (mapped to a status; the client never sees a stack trace)
        _set_status(grpc_context, exc)
        return empty()


def _set_status(grpc_context: Any, error: Exception) -> None:
    """Trailers set before a raise are dropped by Serve, so the status is set and nothing is raised."""
    code, details, metadata = grpc_status(as_known(error))
    grpc_context.set_code(code)
    grpc_context.set_details(details[:4000])
    grpc_context.set_trailing_metadata(list(metadata))


def _metadata(grpc_context: Any) -> dict[str, str]:
    return {key: value for key, value in grpc_context.invocation_metadata() if isinstance(value, str)}
