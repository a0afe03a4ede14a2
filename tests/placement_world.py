"""Groups, Serve and a router that only remember: what `cluster.control.changes` is tested against."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cluster.control.changes import Changes
from cluster.control.coordinator import Coordinator
from cluster.control.receipts import FINAL, Receipt
from cluster.control.routers import Routers
from cluster.core import GroupInfo, Membership
from cluster.errors import Unavailable
from cluster.placement.planner import Holdings, plan_copies
from cluster.routing.report import RouterReport
from cluster.settings import PlacementConfig
from cluster.telemetry.gaps import GapCounts

LAYERS, EXPERTS = 3, 8


class World:
    """Groups, a router that follows the table, and clients that wait for tokens. Every table is checked as it comes: a
    copy that a router's table names is there, and every expert has one."""

    def __init__(self, groups: int, copies: int, config: PlacementConfig) -> None:
        self.held = {g: [set(e) for e in h] for g, h in enumerate(plan_copies([EXPERTS] * LAYERS, groups, copies))}
        self.born = dict.fromkeys(self.held, 0)
        self.dead: set[int] = set()
        self.plan = ""
        self.problems: list[str] = []
        self.gap_s, self.hot = 0.01, 0
        self.lock = threading.Lock()
        self.told: list[tuple[int, int, tuple[int, ...]]] = []
        self.refuses: Callable[[int, int], bool] = lambda _group, _layer: False
        self.coordinator = Coordinator([EXPERTS] * LAYERS, sorted(self.held), self.ask, epoch=1)
        self.routers = Routers([EXPERTS] * LAYERS, config.window_s, settle_s=0.0)
        self.changes = Changes(self.coordinator, self.routers, self.hold, self, config, copies)
        self.gaps = GapCounts()
        self.loads_LE: Any = np.zeros((LAYERS, EXPERTS), np.int64)
        self.in_use = Membership(self.coordinator.membership().table)
        self.stop_router = threading.Event()
        self.router_stuck = False

    # -- what groups and Serve do --------------------------------------------------------------------------------------

    def ask(self, group: int) -> GroupInfo:
        with self.lock:
            if group in self.dead or group not in self.held:
                raise Unavailable("no answer")
            held = tuple(tuple(sorted(experts)) for experts in self.held[group])
            return GroupInfo(group, "", f"{group}.{self.born[group]}", held, "f", "fp32", host=f"host-{group}")

    def hold(self, group: int, layer: int, experts: Sequence[int]) -> int:
        if self.refuses(group, layer):
            raise Unavailable("planted")
        self.ask(group)
        with self.lock:
            self.told.append((group, layer, tuple(experts)))
            gone = self.held[group][layer] - set(experts)
            named = self.in_use.table.owners[layer]
            self.problems += [
                f"expert {e} of layer {layer} left group {group} while a router's table named it"
                for e in gone
                if group in named[e] and not self.router_stuck
            ]
            read = len(set(experts) - self.held[group][layer])
            self.held[group][layer] = set(experts)
        return read * 100

    def start(self, group: int, holdings: Holdings) -> None:
        with self.lock:
            self.held[group] = [set(experts) for experts in holdings]
            self.born[group] = self.born.get(group, 0) + 1

    def stop(self, group: int) -> None:
        with self.lock:
            if any(group in groups for layer in self.in_use.table.owners for groups in layer):
                self.problems.append(f"group {group} was stopped while a router's table named it")
            self.held.pop(group, None)

    def groups(self) -> list[int]:
        with self.lock:
            return sorted(self.held)

    def keep_plan(self, plan: str) -> None:
        self.plan = plan

    # -- what the router does ------------------------------------------------------------------------------------------

    def route(self) -> None:
        while not self.stop_router.wait(0.02):
            for _ in range(20):
                self.gaps.add(self.gap_s)
            self.loads_LE[:, :] += 1
            self.loads_LE[:, self.hot : self.hot + 2] += 20
            report = RouterReport(
                "r", self.in_use.table.order, activations_LE=self.loads_LE.copy(), prefill_LE=self.loads_LE * 0
            )
            self.routers.told(RouterReport(**{**_fields(report), "gaps": self.gaps.counts()}))
            if not self.router_stuck:
                self.in_use = self.coordinator.membership()
                if self.in_use.table.uncovered():
                    self.problems.append(f"nobody holds {self.in_use.table.uncovered()[:3]}")

    def done(self, receipt: Receipt, timeout_s: float = 20.0) -> Receipt:
        end = self.changes.wait(receipt.number, timeout_s)
        assert end.state in FINAL, end
        return end

    def holdings(self) -> dict[int, list[set[int]]]:
        with self.lock:
            return {group: [set(e) for e in held] for group, held in self.held.items()}


def _fields(report: RouterReport) -> dict[str, Any]:
    return {name: getattr(report, name) for name in RouterReport.__dataclass_fields__}
