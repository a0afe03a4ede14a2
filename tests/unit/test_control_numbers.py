"""What the coordinator concludes from numbers: gaps, load windows, how busy groups are, and layouts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.control.autoscale import TIMES, Autoscaler
from cluster.control.room import check_room
from cluster.control.routers import FORGET_S, ROWS_OF_A_READ, Routers
from cluster.control.verdict import LEAST_GAPS, GapWatch
from cluster.core import GroupInfo, StoreFacts
from cluster.errors import InvalidArgument, Overloaded
from cluster.placement.layout import (
    balancedness,
    holdings_from_slots,
    in_order,
    plan_as_text,
    plan_from_text,
    replan,
    slots_from_holdings,
)
from cluster.placement.planner import plan_copies
from cluster.routing.report import RouterReport
from cluster.telemetry.gaps import GapCounts, quantile_s


class Time:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@given(st.lists(st.floats(0.0002, 900), min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
def test_quantiles_of_gaps_are_right_within_a_class(seconds: list[float], share: float) -> None:
    counts = GapCounts()
    for each in seconds:
        counts.add(each)
    found = quantile_s(counts.counts(), share)
    exact = sorted(seconds)[max(0, int(np.ceil(share * len(seconds))) - 1)]
    assert found is not None
    assert exact * 0.999 <= found <= exact * 1.035


def test_there_is_no_quantile_without_gaps_and_extremes_are_kept() -> None:
    counts = GapCounts()
    assert quantile_s(counts.counts(), 0.99) is None
    for seconds in (0.0, -1.0, 1e9):
        counts.add(seconds)
    assert counts.counts().sum() == 3


def report(name: str, **fields: Any) -> RouterReport:
    return RouterReport(**{"router": name, "table": (1, 1), **fields})


def test_loads_are_what_grew_between_reports_of_each_router() -> None:
    time, layers = Time(), [4, 4]
    routers = Routers(layers, window_s=10, clock=time)
    ones = np.ones((2, 4), np.int64)
    routers.told(report("a", activations_LE=1000 * ones, prefill_LE=0 * ones))  # it may be old: only growth counts
    routers.told(report("b", activations_LE=0 * ones, prefill_LE=0 * ones))
    time.now_s += 5
    routers.told(report("a", activations_LE=1003 * ones, prefill_LE=16 * ones))
    routers.told(report("b", activations_LE=2 * ones, prefill_LE=0 * ones))
    assert (routers.recent_loads(1) == (3 + 2 + 16 / ROWS_OF_A_READ)).all()
    time.now_s += 5
    routers.told(report("b", activations_LE=2 * ones, prefill_LE=0 * ones))
    [window] = routers.windows()
    assert window.seconds == 10
    assert (window.loads_LE == 7).all()
    assert (routers.recent_loads(1) == 7).all()


def test_who_uses_an_old_table_is_known_until_it_is_not_heard_of_for_long() -> None:
    time = Time()
    routers = Routers([4], 10, time)
    assert routers.behind((1, 1)), "nobody has been heard of yet: that may be for lack of time"
    time.now_s += FORGET_S
    routers.told(report("a", table=(1, 4)))
    routers.told(report("b", table=(2, 1)))
    assert routers.behind((1, 5)) == ["a"]
    assert sorted(routers.behind((2, 2))) == ["a", "b"]
    time.now_s += FORGET_S + 1
    assert routers.behind((2, 2)) == []


def test_a_verdict_needs_enough_gaps_on_both_sides() -> None:
    time = Time()
    routers, counts = Routers([4], 10, time), GapCounts()

    def gaps(seconds: float, number: int) -> None:
        for _ in range(number):
            counts.add(seconds)
        time.now_s += 1
        routers.told(report("a", gaps=counts.counts()))

    gaps(0.02, 1)
    gaps(0.02, LEAST_GAPS)
    watch = GapWatch(routers)
    gaps(0.5, 100)
    watch.ended()
    gaps(0.03, LEAST_GAPS - 1)
    assert not watch.enough()
    assert not watch.felt().worse
    gaps(0.03, 1)
    felt = watch.felt()
    assert watch.enough()
    assert felt.worse
    assert (felt.gaps_before, felt.gaps_during, felt.gaps_after) == (LEAST_GAPS, 100, LEAST_GAPS)
    assert felt.gap_p99_ms_during == pytest.approx(500, rel=0.04)


def test_gaps_of_a_router_that_is_new_count_from_its_first_report() -> None:
    routers, counts = Routers([4], 10, Time()), GapCounts()
    counts.add(1.0)
    routers.told(report("a", gaps=counts.counts()))
    assert routers.gaps() is not None
    assert routers.gaps().sum() == 0  # type: ignore[union-attr]


def looks(scaler: Autoscaler, shares: list[tuple[float, float]], groups: int) -> list[int]:
    """``shares``: of time that groups compute, and that the router steps, between two looks."""
    found, busy_s, stepping_s, now_s = [], 0.0, 0.0, 0.0
    for busy, stepping in [(0.0, 0.0), *shares]:
        now_s, busy_s, stepping_s = now_s + 10, busy_s + 10 * busy, stepping_s + 10 * stepping
        found.append(scaler.look(now_s, dict.fromkeys(range(groups), busy_s), {"r": stepping_s}))
    return found[1:]


SATURATED, BUSY_GROUPS, TRUNK_BOUND, HALF, IDLE = (0.3, 1.0), (0.9, 0.5), (0.1, 1.0), (0.2, 0.6), (0.02, 0.1)


@pytest.mark.parametrize("load", [SATURATED, BUSY_GROUPS])
def test_groups_are_added_where_they_would_help(load: tuple[float, float]) -> None:
    assert looks(Autoscaler(1, 4), [load] * TIMES, 2) == [2] * (TIMES - 1) + [3]
    assert looks(Autoscaler(1, 4), [load, HALF, load, load], 2) == [2] * 4, "one look below starts anew"
    assert looks(Autoscaler(1, 2), [load] * 5, 2) == [2] * 5, "not more than allowed"


@pytest.mark.parametrize("load", [TRUNK_BOUND, HALF])
def test_groups_stay_where_another_one_would_not_help_nor_one_less(load: tuple[float, float]) -> None:
    assert looks(Autoscaler(1, 4), [load] * 6, 2) == [2] * 6


def test_groups_go_when_it_is_quiet() -> None:
    assert looks(Autoscaler(1, 4), [IDLE] * TIMES, 2) == [2] * (TIMES - 1) + [1]
    assert looks(Autoscaler(2, 4), [IDLE] * 5, 2) == [2] * 5, "not fewer than allowed"
    assert looks(Autoscaler(3, 4), [IDLE], 2) == [3], "bounds hold at once"
    assert looks(Autoscaler(1, 1), [SATURATED], 2) == [1]


def test_a_process_that_was_restarted_is_no_reason_to_scale() -> None:
    scaler = Autoscaler(1, 4)
    for number in range(6):
        assert scaler.look(10.0 * number, {f"a{number}": 0.0}, {"r": 10.0 * number}) == 1
    for number in range(6, 12):
        assert scaler.look(10.0 * number, {"a": 9.0 * number}, {f"r{number}": 0.0}) == 1
    assert scaler.look(200.0, {"a": 999.0}, {}) == 1, "no router was heard of"


def some_loads(layers: int, experts: int) -> Any:
    return np.array([[random.paretovariate(1.2) for _ in range(experts)] for _ in range(layers)])


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(4, 12), st.integers(1, 3))
@example(6, 4, 3, 11, 3)
def test_the_next_plan_keeps_every_expert_and_as_many_copies(
    layers: int, groups: int, later: int, experts: int, copies: int
) -> None:
    groups, later = min(groups, experts), min(later, experts)
    copies = min(copies, groups)
    current = dict(enumerate(plan_copies([experts] * layers, groups, copies)))
    plan = replan(some_loads(layers, experts), [experts] * layers, current, range(later), {})
    assert sorted(plan) == list(range(later))
    for layer in range(layers):
        counts = [sum(e in held[layer] for held in plan.values()) for e in range(experts)]
        assert min(counts) >= min(copies, later, 2) if copies >= 2 else min(counts) >= 1
        assert sum(counts) >= min(experts * copies, experts * later)
        sizes = [len(held[layer]) for held in plan.values()]
        assert max(sizes) <= max(-(-experts * copies // later), max(len(h[layer]) for h in current.values()))
    assert plan_from_text(plan_as_text(plan), layers) == plan


def test_layers_of_different_widths_are_planned_each_by_itself() -> None:
    widths = [4, 8, 4]
    current = dict(enumerate(plan_copies(widths, 2, 1)))
    loads_LE = np.zeros((3, 8))
    loads_LE[:, :4] = [8, 1, 1, 1]
    loads_LE[1] = [9, 9, 1, 1, 1, 1, 1, 1]
    plan = replan(loads_LE, widths, current, [0, 1, 2], {})
    for layer, width in enumerate(widths):
        assert {e for held in plan.values() for e in held[layer]} == set(range(width))


def test_a_plan_that_is_even_enough_is_left_alone() -> None:
    current = dict(enumerate(plan_copies([8] * 2, 4, 2)))
    assert replan(np.ones((2, 8)), [8] * 2, current, range(4), {}) == current


def test_slots_and_holdings_are_the_same_thing() -> None:
    held = [((0, 3), (1,)), ((2,), ())]
    slots_LS = slots_from_holdings(held, 2)
    assert slots_LS.tolist() == [[0, 3, 2, -1], [1, -1, -1, -1]]
    assert holdings_from_slots(slots_LS, 2) == held
    assert balancedness(np.array([[1.0, 0, 4, 1], [0, 2, 0, 0]]), dict(enumerate(held))) == pytest.approx(
        (0.75 + 0.5) / 2
    )


def test_hosts_with_equally_many_groups_are_the_domains() -> None:
    assert in_order([0, 1, 2, 3], {0: "b", 1: "a", 2: "b", 3: "a"}) == ([1, 3, 0, 2], 2)
    assert in_order([0, 1, 2], {0: "b", 1: "a", 2: "b"})[1] == 3
    assert in_order([0, 1], {0: "a", 1: "a"})[1] == 2
    with pytest.raises(InvalidArgument):
        replan(np.ones((1, 4)), [4], {}, [], {})


def some_group(group: int, held: int, free: int, host: str = "h", **fields: Any) -> GroupInfo:
    layers = (tuple(range(held)),)
    return GroupInfo(
        group,
        "",
        "x",
        layers,
        "f",
        "fp32",
        host=host,
        free_bytes=free,
        expert_sizes=(100,),
        expert_bytes=200 * held,
        **fields,
    )


def test_what_does_not_fit_is_refused_before_anything_is_loaded() -> None:
    """200 bytes an expert, since there are two layouts; a tenth of what is free is left."""
    infos = {0: some_group(0, 4, 1000), 1: some_group(1, 4, 1000)}
    check_room(infos, {0: ((0, 1, 2, 3, 4, 5),), 1: ((0, 1, 2, 3, 9, 10),)})
    with pytest.raises(Overloaded, match="group 1 would load"):
        check_room(infos, {0: (tuple(range(7)),), 1: (tuple(range(7)),)})
    apart = {0: some_group(0, 4, 1000), 1: some_group(1, 4, 1000, host="other")}
    check_room(apart, {0: (tuple(range(7)),), 1: (tuple(range(7)),)})
    check_room(apart, {0: ((0,),), 1: ((1,),), 2: (tuple(range(4)),)})
    with pytest.raises(Overloaded, match="group 2"):
        check_room(apart, {0: ((0,),), 1: ((1,),), 2: (tuple(range(5)),)})
    check_room({0: some_group(0, 4, 0)}, {0: (tuple(range(99)),)})  # nobody says what is free
    stored = some_group(0, 4, 100, store=StoreFacts(1, 1, 1))
    check_room({0: stored}, {0: (tuple(range(99)),)})
