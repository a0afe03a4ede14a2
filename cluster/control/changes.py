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

import numpy as np

from cluster.control.autoscale import Autoscaler
from cluster.control.coordinator import Coordinator
from cluster.control.executor import DRAIN, REFILL, RETURN, SCALE, Closed, Executor, Fleet, Task
from cluster.control.mover import Hold, Moved, Mover
from cluster.control.receipts import DONE, FAILED, FINAL, ROLLED_BACK, RUNNING, WATCHING, Receipt, Receipts
from cluster.control.routers import Routers
from cluster.control.verdict import GapWatch
from cluster.core import Clock, GroupId
from cluster.errors import ExpertMeshError, InvalidArgument
from cluster.placement.layout import balancedness
from cluster.placement.planner import Holdings
from cluster.settings import PlacementConfig

log = logging.getLogger(__name__)

REBALANCE, ROLLBACK = "rebalance", "rollback"
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


class Changes:
    """``start`` begins the thread; all other methods may be called from any thread. ``copies`` of each expert there
    should be at least; receipts have numbers ``above``."""

    def __init__(
        self,
        coordinator: Coordinator,
        routers: Routers,
        hold: Hold,
        fleet: Fleet,
        config: PlacementConfig,
        copies: int = 1,
        clock: Clock = time.monotonic,
        above: int = 0,
    ) -> None:
        self._coordinator, self._routers, self._config, self._clock = coordinator, routers, config, clock
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._queue: deque[Task] = deque()
        self.balancing = config.balance
        span = config.group_range()
        self.autoscaler = Autoscaler(*span) if span is not None else None
        self.receipts = Receipts(above)
        mover = Mover(coordinator, routers, hold, clock, self._sleep)
        self._executor = Executor(coordinator, routers, mover, fleet, self.receipts, copies)
        self._rest_until_s = clock() + config.window_s
        self._look_s = self._refill_after_s = clock()
        self._progress_s = clock()
        self._thread = threading.Thread(target=self._run, name="placement-changes", daemon=True)

    def adopt(self, plan: Mapping[GroupId, Holdings]) -> None:
        """What a coordinator before this one carried out; groups without experts are drained ones."""
        self._executor.adopt(plan)

    def begin(self) -> None:
        """Nobody has changed anything yet: groups should hold what they say that they hold."""
        self._executor.adopt(self._coordinator.holdings())
        self._executor.keep_plan()

    def drained(self) -> list[GroupId]:
        """Groups that hold nothing and get no calls."""
        return sorted(self._executor.drained)

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
            return sorted(set(self._coordinator.groups()) - self._executor.drained)

    def scale(self, count: int, why: str = "asked for") -> Receipt:
        """``count`` groups take calls: adds some, or drains and stops those with the highest numbers.

        Raises:
            InvalidArgument: the count is not possible.
        """
        most = min(self._coordinator.experts_per_layer)
        if not 1 <= count <= most:
            raise InvalidArgument("groups", count, f"must be from 1 to {most}, the experts of a layer")
        active = self.active()
        taken = {*active, *self._coordinator.groups()}
        free = (group for group in range(count + len(taken) + 1) if group not in taken)
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

    def _add(self, kind: str, why: str, groups: tuple[GroupId, ...]) -> Receipt:
        receipt = self.receipts.new(kind, why)
        with self._lock:
            self._queue.append(Task(receipt, groups))
        return receipt

    def _add_planned(self, kind: str, why: str, target: dict[GroupId, Holdings], running: int = 0) -> None:
        """A plan that was made for the groups of now: not where anybody has asked for other groups meanwhile."""
        groups = tuple(group for group in self._executor.taking_calls())
        with self._lock:
            if len(self._queue) == running:
                self._queue.append(Task(self.receipts.new(kind, why), groups, target))

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
            self._add_planned(REFILL, "groups do not hold what they should", lacking)
        elif now_s >= self._rest_until_s:
            self._rest_until_s = now_s + self._config.window_s
            if not self._scale_by_load(now_s) and self.balancing:
                self._balance_by_load()

    def _lacking(self) -> dict[GroupId, Holdings] | None:
        """The plan, where living groups do not hold what it says."""
        plan, held = self._executor.plan(), self._coordinator.holdings()
        if plan is None or all(plan.get(g, holdings) == holdings for g, holdings in held.items()):
            return None
        return plan

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
        target = self._executor.replan(loads_LE, held, active)
        before, after = balancedness(loads_LE, held), balancedness(loads_LE, target)
        if after - before >= self._config.min_gain:
            self._add_planned(REBALANCE, f"balance is {before:.2f}, and would be {after:.2f}", target)

    # -- one change ----------------------------------------------------------------------------------------------------

    def _do(self, task: Task) -> None:
        began_s = self._clock()
        receipt = self.receipts.update(task.receipt, state=RUNNING, began_unix_s=time.time())
        moved, watch = Moved(), GapWatch(self._routers)
        for layer in range(len(self._coordinator.experts_per_layer)):
            if self._coordinator.wanted(layer) is None:
                self._coordinator.want(layer, {g: held[layer] for g, held in self._coordinator.holdings().items()})
        before = self._executor.plan() or {}
        try:
            state, problem, receipt = self._executor.carry_out(task, receipt, moved)
        except Closed:
            raise
        except ExpertMeshError as exc:
            log.error("change %d (%s): %s", receipt.number, receipt.kind, exc)
            state, problem = FAILED, str(exc)
        except Exception as exc:  # a receipt that never ends would keep whoever waits for it waiting
            log.exception("change %d (%s)", receipt.number, receipt.kind)
            state, problem = FAILED, f"{type(exc).__name__}: {exc}"
        if receipt.kind != REFILL:
            rest_s = REST_WINDOWS * self._config.window_s
            self._rest_until_s = max(self._rest_until_s, self._clock() + rest_s)
        receipt = self.receipts.update(
            receipt,
            state=state if receipt.kind != REBALANCE or state != DONE else WATCHING,
            problem=problem,
            duration_s=self._clock() - began_s,
            copies_loaded=moved.loaded,
            copies_dropped=moved.dropped,
            bytes_loaded=moved.num_bytes,
            groups=tuple(self._executor.taking_calls()),
        )
        if state == DONE:
            self._watch(receipt, watch, before)

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
        held = {g: h for g, h in self._coordinator.holdings().items() if g not in self._executor.drained}
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
        self._add_planned(
            ROLLBACK, why, {g: held for g, held in before.items() if g not in self._executor.drained}, running=1
        )
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
