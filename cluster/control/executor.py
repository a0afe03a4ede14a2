"""Carries out one change of groups and of what they hold: starts, moves, stops, and keeps what should be.

Used by the thread of `cluster.control.changes`; `plan`, `drained` and `taking_calls` may be read from any.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.control.coordinator import Coordinator
from cluster.control.mover import Moved, Mover
from cluster.control.receipts import DONE, NOTHING, Receipt, Receipts
from cluster.control.room import check_room
from cluster.control.routers import Routers
from cluster.core import GroupId
from cluster.errors import ExpertMeshError, Unavailable
from cluster.placement.layout import balancedness, plan_as_text, replan
from cluster.placement.planner import Holdings
from cluster.placement.shape import Loads

SCALE, DRAIN, RETURN, REFILL = "scale", "drain", "return", "refill"


class Fleet(Protocol):
    """Starts and stops groups."""

    def start(self, group: GroupId, holdings: Holdings) -> None:
        """Returns when the group is there. Raises ExpertMeshError."""
        ...

    def stop(self, group: GroupId) -> None:
        """Returns when it is gone. Raises ExpertMeshError."""
        ...

    def groups(self) -> list[GroupId]:
        """Those that there are, whoever started them. Raises ExpertMeshError."""
        ...

    def keep_plan(self, plan: str) -> None:
        """Keeps what groups should hold for coordinators and groups that start later."""
        ...


@dataclass(slots=True)
class Task:
    """A change that waits. ``target`` is a plan that is made already."""

    receipt: Receipt
    groups: tuple[GroupId, ...]
    target: dict[GroupId, Holdings] | None = None


class Closed(Exception):
    """The coordinator ends."""


class Executor:
    """``copies`` of each expert there should be at least."""

    def __init__(
        self,
        coordinator: Coordinator,
        routers: Routers,
        mover: Mover,
        fleet: Fleet,
        receipts: Receipts,
        copies: int,
    ) -> None:
        self._coordinator, self._routers, self._mover, self._fleet = coordinator, routers, mover, fleet
        self._copies, self._receipts = copies, receipts
        self.drained: frozenset[GroupId] = frozenset()
        """Groups that hold nothing and get no calls."""

    def adopt(self, plan: Mapping[GroupId, Holdings]) -> None:
        """What a coordinator before this one carried out; groups without experts are drained ones."""
        for layer in range(len(self._coordinator.experts_per_layer) if plan else 0):
            self._coordinator.want(layer, {group: holdings[layer] for group, holdings in plan.items()})
        self.drained = frozenset(group for group, holdings in plan.items() if not any(holdings))

    def taking_calls(self) -> list[GroupId]:
        """Groups that are not drained."""
        return sorted(set(self._coordinator.groups()) - self.drained)

    def plan(self) -> dict[GroupId, Holdings] | None:
        """What was carried out last; None where groups hold what they started with."""
        layers = [self._coordinator.wanted(layer) for layer in range(len(self._coordinator.experts_per_layer))]
        if any(layer is None for layer in layers):
            return None
        groups = sorted({group for layer in layers if layer is not None for group in layer})
        none: frozenset[int] = frozenset()
        return {g: tuple(tuple(sorted(layer.get(g, none))) for layer in layers if layer is not None) for g in groups}

    def replan(
        self, loads_LE: Loads, current: Mapping[GroupId, Holdings], groups: Sequence[GroupId]
    ) -> dict[GroupId, Holdings]:
        """What ``groups`` should hold by these loads: see `cluster.placement.layout`."""
        hosts = {group: info.host for group, info in self._coordinator.membership().groups.items()}
        return replan(loads_LE, self._coordinator.experts_per_layer, current, groups, hosts, self._copies)

    def keep_plan(self) -> None:
        """For coordinators and groups that start later, as far as it has been carried out."""
        self._fleet.keep_plan(plan_as_text(self.plan() or {}))

    def carry_out(self, task: Task, receipt: Receipt, moved: Moved) -> tuple[str, str, Receipt]:
        """One change: how it ended, what is to be said of it, and its receipt; counts in ``moved``.

        Raises:
            ExpertMeshError: some of it could not be done; what could stays, and no expert has fewer copies than before.
        """
        coordinator = self._coordinator
        held, members = coordinator.holdings(), coordinator.groups()
        if task.target is not None and set(task.groups) != set(self.taking_calls()):
            return NOTHING, "the groups are not those any more that it was planned for", receipt
        loads_LE = self._routers.recent_loads(2)
        # A group that is dead counts with what it should hold: it will be back.
        current = {g: h for g, h in {**held, **(self.plan() or {})}.items() if g in members}
        current = {g: h for g, h in current.items() if g not in self.drained or g in task.groups}
        target = task.target or self.replan(loads_LE, current, task.groups)
        kept = {group: held[group] for group in held if group not in self.drained}
        receipt = self._receipts.update(
            receipt,
            balance_before=balancedness(loads_LE, kept),
            balance_predicted=balancedness(loads_LE, target),
        )
        started = [group for group in sorted(target) if group not in members]
        leaving = [group for group in members if group not in task.groups]
        stopped = [g for g in leaving if g not in self.drained] if task.receipt.kind == SCALE else []
        none: Holdings = ((),) * len(coordinator.experts_per_layer)
        idle = dict.fromkeys(leaving, none)
        if not started and all(held.get(g) == holdings for g, holdings in {**target, **idle}.items()):
            return NOTHING, "", receipt
        check_room(coordinator.membership().groups, target)
        if task.receipt.kind == SCALE:  # what an earlier change could not finish
            for group in sorted(set(self._fleet.groups()) - {*members, *started}):
                self._fleet.stop(group)
        try:
            for group in started:
                self._start(group, target[group])
                moved.loaded += sum(len(experts) for experts in target[group])
        except Exception:
            for group in started:
                coordinator.remove(group)
                with contextlib.suppress(ExpertMeshError):
                    self._fleet.stop(group)
            raise
        if started and task.target is None:  # now it is known which hosts they are on
            target = self.replan(loads_LE, target, task.groups)
        self.drained -= set(task.groups)
        self._mover.move({**target, **idle}, moved, self.keep_plan, skip_dead=task.receipt.kind == REFILL)
        self.drained |= set(leaving)
        problems = []
        for group in stopped:
            for layer in range(len(coordinator.experts_per_layer)):
                wanted = coordinator.wanted(layer) or {}
                coordinator.want(layer, {g: sorted(experts) for g, experts in wanted.items() if g != group})
            order = coordinator.remove(group)
            self.drained -= {group}
            self.keep_plan()
            try:
                with contextlib.suppress(Unavailable):  # a router that is stuck finds out by itself
                    self._mover.wait_for_routers(order)
                self._fleet.stop(group)
            except ExpertMeshError as exc:
                problems.append(f"group {group} gets no calls, but was not stopped: {exc}; scale again")
        self.keep_plan()
        return DONE, "; ".join(problems), receipt

    def _start(self, group: GroupId, holdings: Holdings) -> None:
        """A new group, warm and known.

        Raises:
            ExpertMeshError: it did not start.
        """
        self._fleet.start(group, holdings)
        self._coordinator.add(group)
        self._coordinator.poll()
        if group not in self._coordinator.holdings():
            raise Unavailable(f"group {group} was started, and does not answer")
