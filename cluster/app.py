"""Composition root: wires every layer together and builds the Serve applications.

One application ``expertmesh`` holds router and coordinator; every expert group is an application of its own,
``experts-<i>``: re-running an application restarts all of it, adding or removing one restarts no other.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import gRPCOptions

from cluster.api.ports import free_port, wait_for_port
from cluster.api.router import Router
from cluster.api.serve import RouterShell
from cluster.config import COMPUTE_ENVIRONMENT, Config, split_address
from cluster.control.applications import APP, applications, group_app, remove_applications, run_applications
from cluster.control.serve import CoordinatorShell, ServeFleet
from cluster.core import Deadline, GroupId, GroupInfo, Membership
from cluster.errors import ConfigError, Unavailable
from cluster.experts.group import ExpertGroup
from cluster.experts.kept import basis_of, keep_plan
from cluster.experts.serve import ExpertsShell
from cluster.placement.binding import Binding
from cluster.placement.hosts import preferred_host
from cluster.placement.planner import Holdings, table_from_groups
from cluster.placement.shares import check_room
from cluster.plan import Plan
from cluster.settings import LOOPBACK
from cluster.transport.base import Transport
from cluster.transport.inproc import InprocTransport
from cluster.weights.footprint import available_bytes, check_fits

log = logging.getLogger(__name__)

INGRESS_TIMEOUT_S = 30.0
CONTROL_LOOP_S = "0.25"
"""So often Serve's controller of a local Ray looks at everything. At its own 0.1 s that takes 33 ms of CPU a
second from cores that compute and the metadata service beside it 18; at this 17 and 12, and nothing starts later."""
ACTOR_CPUS = 0.05
"""CPUs that Ray books for an actor: little, or a router and its groups would not fit two cores."""
GRPC_FUNCTIONS = [f"cluster.api.ingress.{name}" for name in ("add_inference", "add_control", "add_health")]
_ENVIRONMENT = {
    **COMPUTE_ENVIRONMENT,
    # A transfer that fails breaks its link, and gRPC carries on: NCCL's watchdog would end the process instead.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
}

Progress = Callable[[str], None]


# -- what runs in the router's process -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BuildRouter:
    """Makes the router inside its replica; Ray carries it there."""

    plan: Plan

    def __call__(self, config: Config, fetch: Callable[[], Membership], binding: Binding) -> Router:
        """The router, with groups in this process or behind links."""
        threads = config.threads or binding.threads(_cores())
        if not self.plan.one_process:
            return Router(config, fetch, threads, binding=binding)
        groups = {i: ExpertGroup(i, held, config, threads, listen=False) for i, held in enumerate(self.plan.holdings)}

        def membership() -> Membership:
            infos = {i: group.info() for i, group in groups.items()}
            return Membership(table_from_groups(1, 1, self.plan.experts_per_layer, infos.values()), infos)

        def link(info: GroupInfo, _deadline: Deadline) -> Transport:
            return InprocTransport(info.group, groups[info.group].host)

        return Router(config, membership, threads, link, binding)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# -- Ray and Serve -------------------------------------------------------------------------------------------------


class RaySession:
    """A Ray cluster with Serve on it: joined by address, or a local one that ends with the session. ``only_ray``: as it
    is, for who looks and does not serve.

    Use as a context manager.
    """

    def __init__(self, config: Config, progress: Progress, only_ray: bool = False) -> None:
        self._config, self._progress, self._only_ray = config, progress, only_ray
        self._local = not config.address
        self._stdout = contextlib.ExitStack()

    def __enter__(self) -> RaySession:
        # Ray prints messages of its daemons to standard output, which belongs to results.
        self._stdout.enter_context(contextlib.redirect_stdout(_LogStream()))
        try:
            return self._enter()
        except BaseException:
            self.__exit__()
            raise

    def _enter(self) -> RaySession:
        # Read by Ray when its processes start: an upgrade notice to nobody, and 30 s of waiting at shutdown.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", CONTROL_LOOP_S)
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._progress("starting a local Ray" if self._local else f"joining Ray at {self._config.address}")
        # A local Ray's processes call each other on loopback. They listen everywhere all the same: Ray's token keeps
        # strangers out there.
        options: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if self._local else {}
        if self._local and os.environ.get("RAY_AUTH_MODE", "token") != "token":
            self._progress("RAY_AUTH_MODE is not token: whoever reaches this machine's ports can run code here")
        if not self._local:
            # `ray start` turns token authentication on wherever this user has a token; `ray.init` with an address does
            # not look for one by itself. A cluster without authentication ignores the token.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        try:
            ray.init(
                address="local" if self._local else self._config.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
        except (ConnectionError, ValueError, RuntimeError) as exc:
            raise Unavailable(f"address: cannot join Ray at {self._config.address!r}: {_one_line(exc)}") from exc
        if not self._only_ray:
            self._start_serve()
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        return self

    def _start_serve(self) -> None:
        self._progress("starting Ray Serve")
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if self._config.front_door == "router":
            serve.start(proxy_location="Disabled")
            return
        _, port = split_address("listen", self._config.listen)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": free_port()},
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=GRPC_FUNCTIONS),
        )

    def __exit__(self, *_exc: object) -> None:
        with self._stdout:
            if not ray.is_initialized():
                return
            try:
                if self._local:
                    serve.shutdown()
            except (ray.exceptions.RayError, TimeoutError, ConnectionError) as exc:
                log.warning("Serve did not shut down cleanly: %s", _one_line(exc))
            finally:
                ray.shutdown()


class _LogStream(io.TextIOBase):
    """A stream whose lines go to the log at level debug."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                log.debug("ray: %s", line.rstrip())
        return len(text)


@dataclass(slots=True)
class Deployment:
    """The applications of one served model. ``addresses`` are the client ports, one a router."""

    plan: Plan
    addresses: list[str] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The first router's client port."""
        return self.addresses[0]

    def drain(self, grace_s: float) -> int:
        """NOT_SERVING; waits for running requests. How many were left."""
        try:
            router = serve.get_app_handle(APP)
            left = router.broadcast("drain", grace_s).results(timeout_s=grace_s + 10)
        except (ray.exceptions.RayError, TimeoutError, serve.exceptions.RayServeException) as exc:
            log.warning("the router did not drain: %s", _one_line(exc))
            return -1
        return int(sum(left))

    def remove(self) -> None:
        """Deletes the applications, whatever groups were added since, and waits until they are gone."""
        remove_all()


def coordinator_pid() -> int:
    """Process id of the coordinator, for drills."""
    pid: int = serve.get_deployment_handle("coordinator", APP).pid.remote().result(timeout_s=10)
    return pid


def controller_pid() -> int:
    """Process id of Serve's controller, for drills."""
    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    return int(ray.get(controller.get_pid.remote(), timeout=10))


def drop_links(group: int) -> None:
    """Closes a group's links, for drills; does nothing while it is not there."""
    with contextlib.suppress(ray.exceptions.RayError, TimeoutError, serve.exceptions.RayServeException):
        serve.get_app_handle(group_app(group)).drop_links.remote().result(timeout_s=10)


def remove_all() -> list[str]:
    """Deletes all applications of ExpertMesh on this cluster, whoever put them there; returns their names."""
    removed: list[str] = []
    while names := applications():  # the coordinator may have been starting one
        remove_applications(names)
        removed += names
    keep_plan("")
    return removed


def deploy(plan: Plan, progress: Progress) -> Deployment:
    """Puts the applications on the Ray cluster that the process is connected to; returns when they serve.

    Raises:
        ConfigError: bytes or GPUs do not suffice.
        ExpertMeshError: what a process failed with while it started.
    """
    config = plan.config
    hosts = hosts_alive()
    if hosts == 1:
        check_fits(plan.processes, available_bytes(), "this machine")
    elif not plan.one_process and config.data_plane.bind in LOOPBACK:
        raise ConfigError(
            f"data_plane.bind: got {config.data_plane.bind!r}; the cluster has {hosts} hosts, and links between them "
            "need an interface that they reach, such as 0.0.0.0 (EXPERTMESH_DATA_PLANE__BIND=0.0.0.0)"
        )
    gpus = gpus_each(plan)
    taken = applications()
    if taken:
        raise ConfigError(
            f"address: ExpertMesh serves on this cluster already ({', '.join(taken)}); stop it first (where its "
            "`serve` is gone: `expertmesh stop --address ...`), or use another cluster"
        )
    deployment = Deployment(plan)
    keep_plan("")
    try:
        # All at once: the router loads its trunk while the groups load, and waits for them.
        groups = [] if plan.one_process else [group_app(i) for i in range(len(plan.holdings))]
        progress(f"loading the router and {len(groups)} expert groups" if groups else "loading the router")
        build = GroupBuilder(plan, gpus, hosts)
        targets = [
            serve.RunTarget(build(i, plan.holdings[i]), name=name, route_prefix=None) for i, name in enumerate(groups)
        ]
        route = "/" if config.front_door == "serve" else None
        run_applications(
            [*targets, serve.RunTarget(router_application(plan, gpus, hosts), name=APP, route_prefix=route)]
        )
        if config.front_door == "serve":
            wait_for_port(config.listen, INGRESS_TIMEOUT_S)
            deployment.addresses = [config.listen]
        else:
            doors = serve.get_app_handle(APP).broadcast("door").results(timeout_s=30)
            deployment.addresses = [address for _, address in sorted(doors)]
    except BaseException:
        deployment.remove()
        raise
    return deployment


def gpus_each(plan: Plan) -> float:
    """``gpu_share`` where the cluster that the process is connected to has GPUs (logical ones count), 0 otherwise.

    Raises:
        ConfigError: they do not suffice.
    """
    have = int(ray.cluster_resources().get("GPU", 0))
    if have == 0 or plan.config.device == "cpu":
        return 0.0
    share = plan.config.gpu_share
    check_room(have, plan.config.routers, 0 if plan.one_process else len(plan.holdings), share)
    return share


def hosts_alive() -> int:
    """Hosts of the cluster."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _actor_options(gpus: float, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``own`` says more, or something else, of where it runs."""
    variables = {**_ENVIRONMENT, **_telemetry_environment()}
    return {"num_cpus": ACTOR_CPUS, "num_gpus": gpus, "runtime_env": {"env_vars": variables}, **(own or {})}


def _telemetry_environment() -> dict[str, str]:
    """The standard OTEL_* variables of whoever serves, for processes of a cluster that was there before. Headers may
    hold secrets, and Ray shows environments to everybody: those are set on the machines themselves."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_") and "HEADERS" not in name}


def _deployment(kind: type, replicas: int = 1, **options: Any) -> Any:
    """``serve.deployment`` with replicas that go quickly (Serve's typing knows only its use as a decorator)."""
    make: Any = serve.deployment
    return make(kind, num_replicas=replicas, graceful_shutdown_wait_loop_s=0.1, **options)


@dataclass(frozen=True, slots=True)
class GroupBuilder:
    """Makes a group's application: here for those at the start, and in the coordinator for those that come later."""

    plan: Plan
    gpus: float
    hosts: int
    actor: Mapping[str, Any] = field(default_factory=dict)
    """Of Ray's actor options, those that say where it runs."""

    def __call__(self, group: GroupId, holdings: Holdings) -> serve.Application:
        """The application, not running yet."""
        config, groups = self.plan.config, len(self.plan.holdings)
        threads = config.threads or max(1, _cores() // max(1, groups))
        deployment = _deployment(
            ExpertsShell,
            name="group",
            max_ongoing_requests=64,
            ray_actor_options=_actor_options(self.gpus, {**self.actor, **self._place(group)}),
            health_check_period_s=2,
            health_check_timeout_s=10,
            graceful_shutdown_timeout_s=2,
        )
        application: serve.Application = deployment.bind(
            group, holdings, config, threads, max(groups, group + 1), self.hosts
        )
        return application

    def _place(self, group: GroupId) -> dict[str, Any]:
        """Groups prefer different hosts: copies on one host die together. Where whole GPUs are booked, they decide."""
        if self.gpus >= 1 or "fallback_strategy" in self.actor or "resources" in self.actor:
            return {}
        return preferred_host(group, self.actor.get("label_selector") or {}, ray.nodes())


def router_application(
    plan: Plan,
    gpus: float,
    hosts: int,
    actor: Mapping[str, Any] | None = None,
    group_actor: Mapping[str, Any] | None = None,
) -> serve.Application:
    """The application of routers and coordinator, not running yet; ``actor``, of the routers, and ``group_actor``, of
    groups that come later, as of `GroupBuilder`."""
    coordinator = None
    if not plan.one_process:
        coordinator = _deployment(
            CoordinatorShell,
            name="coordinator",
            max_ongoing_requests=256,
            ray_actor_options=_actor_options(0),
            graceful_shutdown_timeout_s=2,
        ).bind(
            plan.experts_per_layer,
            list(range(len(plan.holdings))),
            plan.config,
            ServeFleet(
                GroupBuilder(plan, gpus, hosts, group_actor or {}),
                gpus,
                plan.config.start_timeout_s,
                basis_of(plan.config),
            ),
        )
    router = _deployment(
        RouterShell,
        name="router",
        max_ongoing_requests=4096,
        ray_actor_options=_actor_options(gpus, actor),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=5,
        replicas=plan.config.routers,
    )
    application: serve.Application = router.bind(BuildRouter(plan), plan.config, coordinator, hosts)
    return application


def _one_line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300] or type(exc).__name__
