"""The coordinator's Serve shell: asks and tells groups through Serve handles, starts and stops them, keeps epoch and
plan in Ray's key-value store."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.config import Config
from cluster.control.applications import group_app, group_applications, remove_applications, run_application
from cluster.control.changes import Changes
from cluster.control.coordinator import Coordinator
from cluster.control.receipts import Receipt
from cluster.control.routers import Routers
from cluster.core import GroupId, GroupInfo, Membership
from cluster.errors import ConfigError, ExpertMeshError, Unavailable
from cluster.experts.kept import basis_of, keep_plan, kept_plan
from cluster.placement.layout import balancedness
from cluster.placement.planner import Holdings
from cluster.placement.shares import has_room
from cluster.routing.report import RouterReport
from cluster.telemetry import logs

ASK_TIMEOUT_S = 2.0
RECEIPTS_OF_AN_EPOCH = 10_000
HOLD_TIMEOUT_S = 300.0
_EPOCH_KEY = b"expertmesh:epoch"
RESTART_S = 15.0
"""For groups to answer a coordinator that comes after another one, which the dead must not keep from starting."""
T = TypeVar("T")
BuildGroup = Callable[[GroupId, Holdings], serve.Application]


def next_epoch() -> int:
    """A number higher than every one before it in this Ray cluster."""
    raw = _internal_kv_get(_EPOCH_KEY)
    epoch = int(raw) + 1 if raw else 1
    _internal_kv_put(_EPOCH_KEY, str(epoch).encode(), overwrite=True)
    return epoch


def ask_group(epoch: int, group: GroupId) -> GroupInfo:
    """One group's info through its Serve handle; ``epoch`` is the coordinator's.

    Raises:
        Unavailable: it did not answer in time, or listens to a newer coordinator.
    """
    try:
        info: GroupInfo = serve.get_app_handle(group_app(group)).info.remote(epoch).result(timeout_s=ASK_TIMEOUT_S)
    except (RayError, TimeoutError, serve.exceptions.RayServeException) as exc:
        raise Unavailable(f"group {group} does not answer: {type(exc).__name__}") from exc
    return info


def tell_group(epoch: int, group: GroupId, layer: int, experts: Sequence[int]) -> int:
    """Lets a group hold exactly these experts of a layer; bytes that it read. Raises as `ask_group`, or where the group
    cannot."""
    try:
        handle = serve.get_app_handle(group_app(group))
        read: int = handle.hold.remote(layer, tuple(experts), epoch).result(timeout_s=HOLD_TIMEOUT_S)
    except ExpertMeshError as exc:  # Ray's errors of tasks are of their cause's class too
        raise Unavailable(f"group {group} cannot hold {len(experts)} experts of layer {layer}: {_last(exc)}") from exc
    except (RayError, TimeoutError, serve.exceptions.RayServeException) as exc:
        raise Unavailable(f"group {group} does not answer: {type(exc).__name__}") from exc
    return read


def _last(exc: Exception) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[-1] if lines else type(exc).__name__


@dataclass(frozen=True, slots=True)
class ServeFleet:
    """Groups as Serve applications. ``gpus`` each wants."""

    build: BuildGroup
    gpus: float
    start_timeout_s: float
    basis: str
    """What plans are kept for."""

    def start(self, group: GroupId, holdings: Holdings) -> None:
        """See `cluster.control.executor.Fleet`."""
        there = group in self.groups()  # left by a change that was not finished; it has its GPU
        gpus, free = (_typed(ask).get("GPU", 0.0) for ask in (ray.cluster_resources, ray.available_resources))
        if not there and not has_room(gpus, free, self.gpus):
            raise ConfigError(f"groups: group {group} needs {self.gpus:g} GPU, and {free:g} are free in the cluster")
        run_application(self.build(group, holdings), group_app(group), self.start_timeout_s)

    def stop(self, group: GroupId) -> None:
        """See `cluster.control.executor.Fleet`."""
        _typed(lambda: remove_applications([group_app(group)]))

    def groups(self) -> list[GroupId]:
        """See `cluster.control.executor.Fleet`."""
        return _typed(group_applications)

    def keep_plan(self, plan: str) -> None:
        """See `cluster.control.executor.Fleet`."""
        _typed(lambda: keep_plan(plan, self.basis))


def _typed(call: Callable[[], T]) -> T:
    """What Ray or Serve answers.

    Raises:
        Unavailable: neither does.
    """
    try:
        return call()
    except (RayError, RuntimeError, TimeoutError, serve.exceptions.RayServeException) as exc:
        raise Unavailable(f"Ray Serve does not answer: {type(exc).__name__}: {exc}") from exc


@dataclass(frozen=True, slots=True)
class PlacementView:
    """How placement is looked after: what `expertmesh status --rebalances` shows."""

    receipts: list[Receipt]
    routers: list[RouterReport]
    balance: bool
    autoscale: tuple[int, int]
    drained: list[GroupId]
    balance_now: float | None
    windows: int
    window_s: float
    progress_age_s: float
    autoscale_why: str


class CoordinatorShell:
    """Deployment ``coordinator`` of the application ``expertmesh``."""

    def __init__(
        self, experts_per_layer: Sequence[int], groups: Sequence[GroupId], config: Config, fleet: ServeFleet
    ) -> None:
        logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
        self._window_s = config.placement.window_s
        plan = kept_plan(len(experts_per_layer), basis_of(config))  # of a coordinator before this one
        members = groups if plan is None else fleet.groups()
        epoch = next_epoch()
        self._coordinator = Coordinator(experts_per_layer, members, partial(ask_group, epoch), epoch)
        self._routers = Routers(experts_per_layer, self._window_s)
        self._changes = Changes(
            self._coordinator,
            self._routers,
            partial(tell_group, epoch),
            fleet,
            config.placement,
            config.copies,
            above=epoch * RECEIPTS_OF_AN_EPOCH,
        )
        if plan is None:
            self._coordinator.start(config.start_timeout_s)
            self._changes.begin()
        else:
            self._changes.adopt({group: held for group, held in plan.items() if group in members})
            self._coordinator.poll()
            # Where nobody answers, all are new: after `serve shutdown`, or a head that was lost.
            begun = bool(self._coordinator.membership().groups)
            self._coordinator.start(RESTART_S if begun else config.start_timeout_s, without=True)
        self._changes.start()

    def membership(self, report: RouterReport | None = None) -> Membership:
        """See `Coordinator`. A router tells how it is when it asks."""
        if report is not None:
            self._routers.told(report)
        return self._coordinator.membership()

    def change(self, kind: str, value: int) -> int:
        """Asks for a change: a field of ``ChangePlacementRequest`` and its value. The number of its receipt, or 0.

        Raises:
            InvalidArgument: it is not possible.
        """
        changes = self._changes
        if kind == "balance":
            changes.balancing = bool(value)
            return 0
        asked: dict[str, Callable[[], Receipt]] = {
            "groups": lambda: changes.scale(value),
            "drain": lambda: changes.drain(value),
            "give_back": lambda: changes.give_back(value),
            "rebalance": changes.rebalance,
        }
        receipt: Receipt = asked[kind]()
        return receipt.number

    def placement(self) -> PlacementView:
        """Everything that `expertmesh status --rebalances` shows."""
        windows, held = self._routers.windows(), self._coordinator.holdings()
        scaler = self._changes.autoscaler
        drained = self._changes.drained()
        taking = {group: holdings for group, holdings in held.items() if group not in drained}
        return PlacementView(
            self._changes.receipts.all(),
            self._routers.reports(),
            self._changes.balancing,
            (scaler.least, scaler.most) if scaler is not None else (0, 0),
            drained,
            balancedness(self._routers.recent_loads(2), taking) if windows and taking else None,
            len(windows),
            self._window_s,
            self._changes.progress_age_s(),
            scaler.why if scaler is not None else "",
        )

    def pid(self) -> int:
        """Its process id, for drills."""
        return os.getpid()

    def check_health(self) -> None:
        """Serve restarts a coordinator whose loop is stuck."""
        age_s = self._coordinator.progress_age_s()
        if age_s > 60:
            raise Unavailable(f"the coordinator's loop made no progress for {age_s:.0f} s")
