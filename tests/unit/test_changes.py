"""Changes of the placement against groups that only remember what they hold: what the table says on the way, what is
undone, and what is left when something fails in the middle."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cluster.control import changes as changes_module
from cluster.control.changes import Changes
from cluster.control.coordinator import Coordinator
from cluster.control.routers import Routers
from cluster.errors import InvalidArgument, Unavailable
from cluster.placement.layout import plan_from_text
from cluster.placement.planner import Holdings, plan_copies
from cluster.settings import PlacementConfig
from tests.placement_world import EXPERTS, LAYERS, World


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "REPORTS_S": 0.1,
        "VERDICT_S": 2.0,
        "LEAST_VERDICT_S": 0.1,
        "IDEA_PERIOD_S": 0.05,
        "REFILL_S": 0.5,
        "LEAST_LOAD": 10.0,
    }.items():
        monkeypatch.setattr(changes_module, name, value)
    monkeypatch.setattr("cluster.control.mover.ACK_TIMEOUT_S", 1.0)
    monkeypatch.setattr("cluster.control.mover.SETTLE_S", 0.02)
    monkeypatch.setattr("cluster.control.coordinator.POLL_PERIOD_S", 0.3)


@contextmanager
def world(groups: int = 3, copies: int = 2, **config: Any) -> Iterator[World]:
    made = World(groups, copies, PlacementConfig(**{"window_s": 0.2, **config}))
    router = threading.Thread(target=made.route)
    made.coordinator.start(5)
    made.changes.begin()
    router.start()
    made.changes.start()
    try:
        yield made
        assert made.problems == []
    finally:
        made.changes.close()
        made.stop_router.set()
        router.join()
        made.coordinator.close()


def copies_of(held: dict[int, list[set[int]]], layer: int) -> list[int]:
    return [sum(expert in experts[layer] for experts in held.values()) for expert in range(EXPERTS)]


def test_groups_come_and_go_and_every_expert_keeps_two_copies() -> None:
    with world() as w:
        up = w.done(w.changes.scale(5))
        assert (up.state, up.groups) == ("done", (0, 1, 2, 3, 4))
        assert all(count >= 2 for layer in range(LAYERS) for count in copies_of(w.holdings(), layer))
        assert up.copies_loaded > 0
        assert max(len(experts) for held in w.holdings().values() for experts in held) == -(-2 * EXPERTS // 5), (
            "and no more"
        )
        down = w.done(w.changes.scale(2))
        assert (down.state, down.groups) == ("done", (0, 1))
        held = w.holdings()
        assert sorted(held) == [0, 1]
        assert all(experts == set(range(EXPERTS)) for layers in held.values() for experts in layers)
        assert plan_from_text(w.plan, LAYERS) == {g: tuple(tuple(sorted(e)) for e in h) for g, h in held.items()}


def test_a_drained_group_holds_nothing_and_comes_back() -> None:
    with world() as w:
        assert w.done(w.changes.drain(1)).state == "done"
        assert not any(w.holdings()[1])
        assert w.changes.drained() == [1]
        assert not any(1 in groups for layer in w.in_use.table.owners for groups in layer)
        with pytest.raises(InvalidArgument, match="those that take calls: 0, 2"):
            w.changes.drain(1)
        assert w.done(w.changes.scale(3)).groups == (0, 2, 3), "a drained group is not counted, and not stopped"
        assert w.done(w.changes.give_back(1)).groups == (0, 1, 2, 3)
        assert all(w.holdings()[1])
        with pytest.raises(InvalidArgument, match="drained"):
            w.changes.give_back(1)


def test_what_is_not_possible_is_refused_at_once() -> None:
    with world(groups=2) as w:
        for count in (0, EXPERTS + 1):
            with pytest.raises(InvalidArgument, match="groups"):
                w.changes.scale(count)
        w.done(w.changes.drain(0))
        with pytest.raises(InvalidArgument, match="last"):
            w.changes.drain(1)


def test_hot_experts_are_spread_when_balance_is_on() -> None:
    with world(copies=1, balance=True, min_gain=0.05) as w:
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and not any(r.state == "done" for r in w.changes.receipts.all()):
            time.sleep(0.05)
        [receipt] = [r for r in w.changes.receipts.all() if r.state == "done"][:1]
        assert receipt.kind == "rebalance"
        assert receipt.balance_predicted is not None
        assert receipt.balance_before is not None
        assert receipt.balance_predicted > receipt.balance_before + 0.05
        assert receipt.gap_p99_ms_after == pytest.approx(10, rel=0.05)
        assert min(receipt.gaps_before, receipt.gaps_after) >= 50
        hot = [[g for g, held in w.holdings().items() if {w.hot, w.hot + 1} <= held[layer]] for layer in range(LAYERS)]
        assert hot == [[]] * LAYERS, "the two hot experts are in two groups"


def test_a_rebalance_that_makes_gaps_longer_is_taken_back() -> None:
    with world(copies=1) as w:
        time.sleep(0.5)
        before = w.holdings()
        receipt = w.changes.rebalance()
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and not w.told:
            time.sleep(0.001)
        w.gap_s = 0.013
        assert w.done(receipt).state == "rolled back"
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and w.holdings() != before:
            time.sleep(0.05)
        assert w.holdings() == before
        assert [r.kind for r in w.changes.receipts.all()] == ["rebalance", "rollback"]


def test_a_group_that_came_back_as_it_was_started_gets_what_it_should_hold() -> None:
    with world() as w:
        w.done(w.changes.scale(4))
        wanted = w.holdings()
        w.dead.add(1)
        time.sleep(0.2)
        with w.lock:
            w.held[1] = [set(e) for e in plan_copies([EXPERTS] * LAYERS, 3, 2)[1]]
            w.born[1] += 1
        w.dead.clear()
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and w.holdings() != wanted:
            time.sleep(0.05)
        assert w.holdings() == wanted
        assert "refill" in [r.kind for r in w.changes.receipts.all()]


@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_change_that_fails_in_the_middle_leaves_every_expert_where_it_was_or_better(layer: int) -> None:
    with world() as w:
        w.refuses = lambda group, at: group == 0 and at == layer
        receipt = w.done(w.changes.scale(2))
        assert receipt.state == "failed"
        assert "planted" in receipt.problem
        assert all(count >= 2 for at in range(LAYERS) for count in copies_of(w.holdings(), at))
        w.refuses = lambda _group, _layer: False
        assert w.done(w.changes.scale(2)).state == "done"


def test_a_router_that_keeps_an_old_table_keeps_its_copies() -> None:
    with world() as w:
        w.router_stuck = True
        receipt = w.done(w.changes.drain(2))
        assert receipt.state == "failed"
        assert "older table" in receipt.problem
        assert w.holdings()[2][0] == set(plan_copies([EXPERTS] * LAYERS, 3, 2)[2][0]), "nothing was dropped"


def test_a_new_coordinator_goes_on_with_what_the_last_one_carried_out() -> None:
    with world() as w:
        w.done(w.changes.drain(0))
        plan = plan_from_text(w.plan, LAYERS)
        assert plan is not None
        coordinator = Coordinator([EXPERTS] * LAYERS, sorted(plan), w.ask, epoch=2)
        later = Changes(coordinator, Routers([EXPERTS] * LAYERS, 1.0), w.hold, w, PlacementConfig())
        later.adopt(plan)
        coordinator.poll()
        assert later.drained() == [0]
        assert later.active() == [1, 2]
        assert coordinator.membership().table.owners == w.coordinator.membership().table.owners
        coordinator.close()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"0": [[1]]}', '{"x": [[1],[1],[1]]}', '{"0": 5}', "nonsense"])
def test_a_plan_of_something_else_is_none(text: str) -> None:
    assert plan_from_text(text, LAYERS) is None


def plan_of(w: World) -> dict[int, Holdings]:
    plan = plan_from_text(w.plan, LAYERS)
    assert plan is not None
    return plan


def next_coordinator(w: World) -> Coordinator:
    """As the shell begins after another one: members are the groups that there are."""
    coordinator = Coordinator([EXPERTS] * LAYERS, w.groups(), w.ask, epoch=2)
    changes = Changes(coordinator, Routers([EXPERTS] * LAYERS, 1.0, settle_s=0.0), w.hold, w, PlacementConfig())
    changes.adopt({group: held for group, held in plan_of(w).items() if group in w.groups()})
    coordinator.poll()
    return coordinator


@pytest.mark.parametrize("layer", range(1, LAYERS))
def test_a_change_that_ends_in_the_middle_of_a_model_with_one_copy_leaves_no_expert_without_a_plan(layer: int) -> None:
    """Whoever restarts then, group or coordinator, has every expert."""
    with world(copies=1) as w:
        w.refuses = lambda _group, at: at == layer
        assert w.done(w.changes.scale(4)).state == "failed"
        plan = plan_of(w)
        for at in range(LAYERS):
            assert {e for held in plan.values() for e in held[at]} == set(range(EXPERTS))
        coordinator = next_coordinator(w)
        assert coordinator.membership().table.uncovered() == []
        coordinator.close()
        w.refuses = lambda _group, _layer: False


def test_copies_that_are_all_there_is_are_not_dropped_although_others_are_wanted() -> None:
    with world(copies=1) as w:
        w.router_stuck = True
        assert w.done(w.changes.drain(0)).state == "failed", "loaded elsewhere, and not dropped yet"
        spare = set(w.holdings()[0][0])
        assert spare
        w.refuses = lambda group, _layer: group == 0  # nobody drops anything until group 1 counts as dead
        w.dead.add(1)
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and 1 in w.coordinator.holdings():
            time.sleep(0.05)
        w.problems.clear()
        w.router_stuck, w.refuses = False, lambda _group, _layer: False
        elsewhere = w.holdings()[2][0]
        lonely = spare - elsewhere
        assert lonely, "only group 1 and this one have these"
        time.sleep(2.0)
        assert lonely <= w.holdings()[0][0]
        w.problems.clear()  # what only group 1 ever had
        w.dead.clear()


def test_a_group_that_cannot_be_stopped_is_stopped_later_and_no_coordinator_waits_for_it() -> None:
    with world() as w:
        stop = w.stop
        w.stop = lambda _group: (_ for _ in ()).throw(Unavailable("planted"))  # type: ignore[method-assign]
        receipt = w.done(w.changes.scale(2))
        assert receipt.state == "done"
        assert "was not stopped" in receipt.problem
        assert sorted(plan_of(w)) == [0, 1]
        w.stop = stop  # type: ignore[method-assign]
        assert w.done(w.changes.scale(3)).groups == (0, 1, 2)
        assert w.done(w.changes.scale(2)).state == "done"
        assert w.groups() == [0, 1]


def test_errors_of_any_kind_end_a_change() -> None:
    with world() as w:
        w.start = lambda _group, _held: (_ for _ in ()).throw(RuntimeError("planted"))  # type: ignore[method-assign]
        receipt = w.done(w.changes.scale(5))
        assert receipt.state == "failed"
        assert "planted" in receipt.problem
        assert w.changes.active() == [0, 1, 2]
        assert w.done(w.changes.rebalance()).state in ("done", "nothing to do")


def test_second_copies_come_back_with_the_groups() -> None:
    with world() as w:
        w.done(w.changes.scale(1))
        w.done(w.changes.scale(3))
        assert all(count >= 2 for layer in range(LAYERS) for count in copies_of(w.holdings(), layer))


def test_a_group_that_is_being_drained_is_not_taken_for_a_new_one() -> None:
    with world() as w:
        first, second = w.changes.drain(1), w.changes.scale(3)
        assert w.done(first).state == "done"
        assert w.done(second).groups == (0, 2, 3)
        assert w.changes.drained() == [1]


def test_a_plan_for_other_groups_than_there_are_is_not_carried_out() -> None:
    with world(copies=1) as w:
        time.sleep(0.5)
        w.gap_s = 0.01
        receipt = w.changes.rebalance()
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and not w.told:
            time.sleep(0.001)
        w.gap_s = 0.02  # it will be taken back
        while time.monotonic() < until_s and receipt.number not in [
            r.number for r in w.changes.receipts.all() if r.state == "watching"
        ]:
            time.sleep(0.01)
        scaled = w.changes.scale(2)
        assert w.done(scaled).groups == (0, 1)
        time.sleep(1.0)
        assert w.groups() == [0, 1], "nobody started group 2 again"
