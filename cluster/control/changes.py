"""Changes of the placement, one after the other: asked for by people, or by what the coordinator sees.

A thread takes them from a queue. When the queue is empty it looks whether groups hold what they should (one that came
back may not), whether another plan would be clearly more even, and whether groups are too busy or too idle.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.control.autoscale import Autoscaler
from cluster.control.coordinator import Coordinator
from cluster.control.mover import Hold, Moved, Mover
from cluster.control.receipts import DONE, FAILED, FINAL, NOTHING, ROLLED_BACK, RUNNING, WATCHING, Receipt, Receipts
from cluster.control.routers import Routers
from cluster.control.verdict import GapWatch
from cluster.core import Clock, GroupId
from cluster.errors import ExpertMeshError, InvalidArgument, Unavailable
from cluster.placement.layout import balancedness, plan_as_text, replan
from cluster.placement.planner import Holdings
from cluster.settings import PlacementConfig

log = logging.getLogger(__name__)

REBALANCE, SCALE, DRAIN, RETURN, REFILL, ROLLBACK = "rebalance", "scale", "drain", "return", "refill", "rollback"
VERDICT_S, LEAST_VERDICT_S = 60.0, 3.0
"""A change is judged within so much time, and after so much: what it costs itself is over then."""
REPORTS_S = 1.5
"""Routers have reported by then."""
REST_WINDOWS = 3
"""Load windows after a change before the next is thought of; ten times as many after a rollback."""
LEAST_LOAD = 500.0
"""Activations a layer from which on loads mean something."""
IDEA_PERIOD_S, REFILL_S = 1.0, 5.0
"""Between two looks at what could be done; and between two tries to fill groups that lack something."""


class Fleet(Protocol):
    """Starts and stops groups."""

    def start(self, group: GroupId, holdings: Holdings) -> None:
        """Returns when the group is there. Raises ExpertMeshError."""
        ...

    def stop(self, group: GroupId) -> None:
        """Returns when it is gone. Raises ExpertMeshError."""
        ...

    def keep_plan(self, plan: str) -> None:
        """Keeps what groups should hold for coordinators and groups that start later."""
        ...


class Closed(Exception):
    """The coordinator ends."""


@dataclass(slots=True)
class _Task:
    """A change that waits. ``target`` is a plan that is made already."""

    receipt: Receipt
    groups: tuple[GroupId, ...]
    target: dict[GroupId, Holdings] | None = None


class Changes:
    """``start`` begins the thread; all other methods may be called from any thread."""

    def __init__(
        self,
        coordinator: Coordinator,
        routers: Routers,
        hold: Hold,
        fleet: Fleet,
        config: PlacementConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        self._coordinator, self._routers, self._fleet, self._config = coordinator, routers, fleet, config
        self._clock = clock
        self._stop = threading.Event()
        self._mover = Mover(coordinator, routers, hold, clock, self._sleep)
        self._lock = threading.Lock()
        self._queue: deque[_Task] = deque()
        self._drained: frozenset[GroupId] = frozenset()
        self.balancing = config.balance
        span = config.group_range()
        self.autoscaler = Autoscaler(*span) if span is not None else None
        self.receipts = Receipts()
        self._rest_until_s = clock() + config.window_s
        self._look_s = self._refill_after_s = clock()
        self._progress_s = clock()
        self._thread = threading.Thread(target=self._run, name="placement-changes", daemon=True)

    def adopt(self, plan: Mapping[GroupId, Holdings]) -> None:
        """What a coordinator before this one carried out; groups without experts are drained ones."""
        for layer in range(len(self._coordinator.experts_per_layer) if plan else 0):
            self._coordinator.want(layer, {group: holdings[layer] for group, holdings in plan.items()})
        self._drained = frozenset(group for group, holdings in plan.items() if not any(holdings))

    def drained(self) -> list[GroupId]:
        """Groups that hold nothing and get no calls."""
        return sorted(self._drained)

    def start(self) -> None:
        """Begins to carry out changes."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; a change under way stops between two steps."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=10)

    def progress_age_s(self) -> float:
        """Seconds since the thread last looked at anything; loading of one layer counts as one look."""
        return self._clock() - self._progress_s

    # -- what people ask for -------------------------------------------------------------------------------------------

    def active(self) -> list[GroupId]:
        """Groups that take calls, or will when the changes that wait are done."""
        with self._lock:
            if self._queue:
                return sorted(self._queue[-1].groups)
            return sorted(set(self._coordinator.groups()) - self._drained)

    def scale(self, count: int, why: str = "asked for") -> Receipt:
        """``count`` groups take calls: adds some, or drains and stops those with the highest numbers.

        Raises:
            InvalidArgument: the count is not possible.
        """
        most = min(self._coordinator.experts_per_layer)
        if not 1 <= count <= most:
            raise InvalidArgument("groups", count, f"must be from 1 to {most}, the experts of a layer")
        active = self.active()
        free = (g for g in range(count + len(active) + len(self._drained) + 1) if g not in active + [*self._drained])
        while len(active) < count:
            active.append(next(free))
        return self._add(SCALE, f"{why}: {count} groups", tuple(sorted(active)[:count]))

    def drain(self, group: GroupId) -> Receipt:
        """The group gets no calls any more; it stays, empty.

        Raises:
            InvalidArgument: there is no such group, or it is the last one.
        """
        active = self.active()
        if group not in active:
            raise InvalidArgument("group", group, f"must be one of those that take calls: {_names(active)}")
        if len(active) == 1:
            raise InvalidArgument("group", group, "is the last one that takes calls")
        return self._add(DRAIN, f"group {group} is drained", tuple(g for g in active if g != group))

    def give_back(self, group: GroupId) -> Receipt:
        """A drained group takes calls again.

        Raises:
            InvalidArgument: it is not drained.
        """
        drained = sorted(set(self._coordinator.groups()) - set(self.active()))
        if group not in drained:
            raise InvalidArgument("group", group, f"must be a drained one: {_names(drained) or 'there is none'}")
        return self._add(RETURN, f"group {group} takes calls again", (*self.active(), group))

    def rebalance(self, why: str = "asked for") -> Receipt:
        """Plans anew from the loads of now."""
        return self._add(REBALANCE, why, tuple(self.active()))

    def _add(
        self, kind: str, why: str, groups: tuple[GroupId, ...], target: dict[GroupId, Holdings] | None = None
    ) -> Receipt:
        receipt = self.receipts.new(kind, why)
        with self._lock:
            self._queue.append(_Task(receipt, groups, target))
        return receipt

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            self._progress_s = self._clock()
            with self._lock:
                task = self._queue[0] if self._queue else None
            try:
                if task is None:
                    self._have_ideas()
                    continue
                try:
                    self._do(task)
                finally:
                    with self._lock:
                        self._queue.popleft()
            except Closed:
                return
            except Exception:
                log.exception("a change of the placement failed")

    def _sleep(self, seconds: float) -> None:
        self._progress_s = self._clock()
        if self._stop.wait(seconds):
            raise Closed

    def _have_ideas(self) -> None:
        now_s = self._clock()
        if now_s < self._look_s + IDEA_PERIOD_S:
            return
        self._look_s = now_s
        lacking = self._lacking() if now_s >= self._refill_after_s else None
        if lacking is not None:
            self._refill_after_s = now_s + REFILL_S
            self._add(REFILL, "groups do not hold what they should", tuple(self.active()), lacking)
        elif now_s >= self._rest_until_s:
            self._rest_until_s = now_s + self._config.window_s
            if not self._scale_by_load(now_s) and self.balancing:
                self._balance_by_load()

    def _lacking(self) -> dict[GroupId, Holdings] | None:
        """The plan, where living groups do not hold what it says."""
        plan, held = self._plan(), self._coordinator.holdings()
        if plan is None or all(plan.get(g, holdings) == holdings for g, holdings in held.items()):
            return None
        return plan

    def _plan(self) -> dict[GroupId, Holdings] | None:
        """What was carried out last; None where groups hold what they started with."""
        layers = [self._coordinator.wanted(layer) for layer in range(len(self._coordinator.experts_per_layer))]
        if any(layer is None for layer in layers):
            return None
        groups = sorted({group for layer in layers if layer is not None for group in layer})
        none: frozenset[int] = frozenset()
        return {g: tuple(tuple(sorted(layer.get(g, none))) for layer in layers if layer is not None) for g in groups}

    def _scale_by_load(self, now_s: float) -> bool:
        if self.autoscaler is None:
            return False
        infos = self._coordinator.membership().groups
        active = self.active()
        busy_s = {(g, infos[g].incarnation): infos[g].busy_s for g in active if g in infos}
        if len(busy_s) < len(active):
            return False  # one is missing: that is not the time
        stepping_s = {report.router: report.stepping_s for report in self._routers.reports()}
        wanted = self.autoscaler.look(now_s, busy_s, stepping_s)
        if wanted == len(active):
            return False
        self.scale(wanted, f"autoscale ({self.autoscaler.why})")
        return True

    def _balance_by_load(self) -> None:
        loads_LE = self._routers.recent_loads(2)
        if float(loads_LE.sum()) < LEAST_LOAD * len(loads_LE):
            return
        active, held = self.active(), self._coordinator.holdings()
        if any(group not in held for group in active):
            return
        held = {group: held[group] for group in active}
        target = replan(loads_LE, self._coordinator.experts_per_layer, held, active, self._hosts())
        before, after = balancedness(loads_LE, held), balancedness(loads_LE, target)
        if after - before >= self._config.min_gain:
            self._add(REBALANCE, f"balance is {before:.2f}, and would be {after:.2f}", tuple(active), target)

    def _hosts(self) -> dict[GroupId, str]:
        return {group: info.host for group, info in self._coordinator.membership().groups.items()}

    # -- one change ----------------------------------------------------------------------------------------------------

    def _do(self, task: _Task) -> None:
        began_s = self._clock()
        receipt = self.receipts.update(task.receipt, state=RUNNING, began_unix_s=time.time())
        moved, watch = Moved(), GapWatch(self._routers)
        before = self._plan() or self._coordinator.holdings()
        problem = ""
        try:
            state, receipt = self._carry_out(task, receipt, moved)
        except ExpertMeshError as exc:
            log.error("change %d (%s): %s", receipt.number, receipt.kind, exc)
            state, problem = FAILED, str(exc)
        self._rest_until_s = self._clock() + REST_WINDOWS * self._config.window_s
        receipt = self.receipts.update(
            receipt,
            state=state if receipt.kind != REBALANCE or state != DONE else WATCHING,
            problem=problem,
            duration_s=self._clock() - began_s,
            copies_loaded=moved.loaded,
            copies_dropped=moved.dropped,
            bytes_loaded=moved.num_bytes,
            groups=tuple(self._taking_calls()),
        )
        if state == DONE:
            self._watch(receipt, watch, before)

    def _taking_calls(self) -> list[GroupId]:
        return sorted(set(self._coordinator.groups()) - self._drained)

    def _carry_out(self, task: _Task, receipt: Receipt, moved: Moved) -> tuple[str, Receipt]:
        coordinator = self._coordinator
        held, members = coordinator.holdings(), coordinator.groups()
        loads_LE = self._routers.recent_loads(2)
        target = task.target or replan(
            loads_LE,
            coordinator.experts_per_layer,
            {g: holdings for g, holdings in held.items() if g not in self._drained or g in task.groups},
            task.groups,
            self._hosts(),
        )
        kept = {group: held[group] for group in held if group not in self._drained}
        receipt = self.receipts.update(
            receipt,
            balance_before=balancedness(loads_LE, kept),
            balance_predicted=balancedness(loads_LE, target),
        )
        started = [group for group in sorted(target) if group not in members]
        leaving = [group for group in members if group not in task.groups]
        stopped = [g for g in leaving if g not in self._drained] if task.receipt.kind == SCALE else []
        none: Holdings = ((),) * len(coordinator.experts_per_layer)
        idle = dict.fromkeys(leaving, none)
        if not started and all(held.get(g) == holdings for g, holdings in {**target, **idle}.items()):
            return NOTHING, receipt
        for group in started:
            self._start(group, target[group])
            moved.loaded += sum(len(experts) for experts in target[group])
        self._drained -= set(task.groups)
        self._mover.move({**target, **idle}, moved, skip_dead=task.receipt.kind == REFILL)
        self._drained |= set(leaving)
        for group in stopped:
            self._mover.wait_for_routers(coordinator.remove(group))
            self._fleet.stop(group)
            self._drained -= {group}
        self._fleet.keep_plan(plan_as_text({**target, **dict.fromkeys(self._drained, none)}))
        return DONE, receipt

    def _start(self, group: GroupId, holdings: Holdings) -> None:
        """A new group, warm and known.

        Raises:
            ExpertMeshError: it did not start; there is nothing left of it.
        """
        try:
            self._fleet.start(group, holdings)
            self._coordinator.add(group)
            self._coordinator.poll()
            if group not in self._coordinator.holdings():
                raise Unavailable(f"group {group} was started, and does not answer")
        except ExpertMeshError:
            self._coordinator.remove(group)
            self._fleet.stop(group)
            raise

    # -- and what came of it -------------------------------------------------------------------------------------------

    def _watch(self, receipt: Receipt, watch: GapWatch, before: dict[GroupId, Holdings]) -> None:
        """Waits until there is enough to judge by; takes a rebalance back that made gaps longer."""
        self._sleep(REPORTS_S)
        watch.ended()
        windows, ended_s = len(self._routers.windows()), self._clock()
        while receipt.kind == REBALANCE and not self._queue_waits():
            waited_s = self._clock() - ended_s
            if waited_s >= VERDICT_S or (watch.enough() and waited_s >= LEAST_VERDICT_S):
                break
            self._sleep(0.5)
        felt = watch.felt()
        loads = [window.loads_LE for window in self._routers.windows()[windows:]]
        held = {g: h for g, h in self._coordinator.holdings().items() if g not in self._drained}
        measured = balancedness(np.sum(loads, axis=0), held) if loads else None
        receipt = self.receipts.update(receipt, state=DONE, balance_measured=measured, **dataclasses.asdict(felt))
        if receipt.kind == REBALANCE and felt.worse:
            self._roll_back(receipt, before)

    def _queue_waits(self) -> bool:
        with self._lock:
            return len(self._queue) > 1

    def _roll_back(self, receipt: Receipt, before: dict[GroupId, Holdings]) -> None:
        self.receipts.update(receipt, state=ROLLED_BACK)
        why = (
            f"change {receipt.number} made gap p99 {receipt.gap_p99_ms_after:.0f} ms of {receipt.gap_p99_ms_before:.0f}"
        )
        self._add(ROLLBACK, why, tuple(sorted(before)), before)
        self._rest_until_s = self._clock() + 10 * REST_WINDOWS * self._config.window_s

    def wait(self, number: int, timeout_s: float) -> Receipt:
        """The receipt when its change is over, or as it is after ``timeout_s``."""
        until_s = self._clock() + timeout_s
        while True:
            receipt = next(r for r in self.receipts.all() if r.number == number)
            if receipt.state in FINAL or self._clock() >= until_s or self._stop.wait(0.1):
                return receipt


def _names(groups: list[GroupId]) -> str:
    return ", ".join(map(str, groups))
