"""Experts with copies: who is asked, and what happens when a group does not answer."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core import LayerCall
from cluster.errors import ConfigError, ExpertMeshError, LinkBroken, Unavailable
from cluster.placement.planner import plan_copies
from cluster.routing.choice import LayerCopies
from cluster.routing.speeds import HEDGED_SHARE, Speeds
from cluster.routing.step import StepContext
from tests.unit.test_dispatcher import World, batch, wanted


@pytest.mark.parametrize(("groups", "copies"), [(2, 2), (3, 2), (5, 2), (4, 3), (3, 1)])
def test_each_expert_is_in_so_many_groups_and_a_dead_one_s_load_is_everybody_s(groups: int, copies: int) -> None:
    plan = plan_copies([60], groups, copies)
    holders = [[group for group in range(groups) if expert in plan[group][0]] for expert in range(60)]
    assert all(len(held) == copies for held in holders)
    if copies == 2 and groups > 2:
        left = [sum(held == sorted((0, other)) for held in holders) for other in range(1, groups)]
        assert max(left) - min(left) <= 2
    with pytest.raises(ConfigError, match="copies"):
        plan_copies([60], groups, groups + 1)


owners = st.lists(st.lists(st.integers(0, 4), min_size=0, max_size=3, unique=True), min_size=4, max_size=12)


@settings(deadline=None)
@given(owners, st.data(), st.booleans(), st.booleans())
def test_an_expert_is_asked_for_where_it_is(
    held: list[list[int]], data: st.DataObject, decode: bool, slow: bool
) -> None:
    experts = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=40))
    chosen_E = LayerCopies(held).choose(np.array(experts), decode, {0: 3.0} if slow else {})
    for expert in set(experts):
        assert chosen_E[expert] in held[expert] if held[expert] else chosen_E[expert] == -1


@pytest.mark.parametrize("decode", [True, False])
def test_the_busiest_group_has_little_more_than_its_share(decode: bool) -> None:
    rng = np.random.default_rng(3)
    copies = LayerCopies([tuple(rng.choice(4, 2, replace=False).tolist()) for _ in range(64)])
    ratios, first = [], []
    for _ in range(50):
        experts = rng.choice(64, 96, p=rng.dirichlet(np.ones(64)))
        counts_E = np.minimum(np.bincount(experts, minlength=64), 1 if decode else 96)
        for found, owner_E in ((ratios, copies.choose(experts, decode, {})), (first, copies.owner_E)):
            load = np.bincount(owner_E, counts_E, minlength=4)
            found.append(load.max() / load.mean())
    assert np.mean(ratios) < 1.1 < np.mean(first)


def test_copies_spread_decode_by_experts_and_prefill_by_tokens() -> None:
    copies = LayerCopies([(0, 1)] * 6)
    experts = np.array([0] * 50 + [1, 2, 3, 4, 5])
    decode = copies.choose(experts, True, {})
    assert np.bincount(decode).tolist() == [3, 3]
    prefill = copies.choose(experts, False, {})
    assert np.bincount(prefill).tolist() in ([1, 5], [5, 1]), "the busy one is alone"
    few = copies.choose(experts[45:], False, {})
    assert np.bincount(few).tolist() == [3, 3], "reading an expert costs something, however few its rows"
    slow = copies.choose(experts, True, {0: 10.0})
    assert np.bincount(slow, minlength=2).tolist() == [0, 6], "a group that is ten times slower is left alone"


def test_a_dead_group_s_calls_go_to_other_copies_at_once_and_it_is_not_asked_again_until_it_answers() -> None:
    world, given_ = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher(group_wait_s=30.0)
    dispatcher(StepContext(1), 0, *given_)
    down = [1]

    def fail(group: int, _call: LayerCall) -> ExpertMeshError | None:
        return LinkBroken("gone") if group in down else None

    world.fail = fail
    version = world.fabric.membership.table.version
    began_s = time.monotonic()
    assert torch.allclose(dispatcher(StepContext(2), 0, *given_), wanted(*given_), atol=1e-5)
    assert time.monotonic() - began_s < 0.5
    assert world.fabric.membership.table.version == version, "nobody was asked for a table"
    assert world.caller.resent_calls > 0
    assert world.fabric.suspects() == [1]
    world.calls.clear()
    assert torch.allclose(dispatcher(StepContext(3), 0, *given_), wanted(*given_), atol=1e-5)
    assert {group for group, _, _ in world.calls} == {0, 2}
    world.fabric._reach(1)
    assert world.fabric.suspects() == [1], "the probe failed"
    down.clear()
    world.fabric._reach(1)
    assert world.fabric.suspects() == []
    world.calls.clear()
    dispatcher(StepContext(4), 0, *given_)
    assert {group for group, _, _ in world.calls} == {0, 1, 2}


def test_when_two_die_what_is_left_with_one_copy_is_waited_for() -> None:
    world, given_ = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher(group_wait_s=5.0)
    tries = [0]

    def fail(group: int, _call: LayerCall) -> ExpertMeshError | None:
        if group == 0:
            return None
        tries[0] += 1
        return LinkBroken("gone") if tries[0] < 6 else None

    world.fail = fail
    assert torch.allclose(dispatcher(StepContext(1), 0, *given_), wanted(*given_), atol=1e-5)


def test_a_hung_group_costs_a_second_and_the_next_step_nothing() -> None:
    world, given_ = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher()
    for step in range(12):
        dispatcher(StepContext(step), 0, *given_)
    world.caller.speeds.hedged(100)  # the budget is spent
    world.delays = {1: 60.0}
    began_s = time.monotonic()
    assert torch.allclose(dispatcher(StepContext(20), 0, *given_), wanted(*given_), atol=1e-5)
    assert 0.9 < time.monotonic() - began_s < 2.0
    began_s = time.monotonic()
    assert torch.allclose(dispatcher(StepContext(21), 0, *given_), wanted(*given_), atol=1e-5)
    assert time.monotonic() - began_s < 0.5
    assert world.cancelled


def test_a_call_that_takes_much_longer_than_usual_is_sent_twice_and_the_first_answer_wins() -> None:
    world, given_ = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher()
    for step in range(40):
        dispatcher(StepContext(step), 0, *given_)
    world.delays = {1: 0.9}
    began_s = time.monotonic()
    assert torch.allclose(dispatcher(StepContext(50), 0, *given_), wanted(*given_), atol=1e-5)
    assert time.monotonic() - began_s < 0.8
    assert world.caller.hedges_won == world.caller.speeds.hedges > 0
    assert world.caller.resent_calls == 0
    assert world.fabric.suspects() == [], "slow is not dead"
    assert world.caller.speeds.hedges <= HEDGED_SHARE * world.caller.speeds.calls + 2


def test_a_hung_group_is_doubted_after_a_few_hedges_and_what_others_answered_is_not_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, given_ = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher()
    for step in range(60):
        dispatcher(StepContext(step), 0, *given_)
    # A busy machine may have made group 1 look slow, and used up what may be sent twice.
    monkeypatch.setattr(world.caller.speeds, "handicaps", dict)
    monkeypatch.setattr(world.caller.speeds, "cost", dict)
    world.caller.speeds.hedged(-10)
    world.delays = {1: 60.0}
    answers = world.caller.speeds._paces[1].answers
    for step in range(4):
        assert world.fabric.suspects() == []
        assert torch.allclose(dispatcher(StepContext(100 + step), 0, *given_), wanted(*given_), atol=1e-5)
    assert world.caller.speeds._paces[1].answers == answers
    assert world.fabric.suspects() == [1]
    began_s = time.monotonic()
    dispatcher(StepContext(200), 0, *given_)
    assert time.monotonic() - began_s < 0.5
    assert world.caller.resent_calls == 0


def test_credit_for_hedges_is_not_saved_up_for_ever() -> None:
    speeds = Speeds()
    for _ in range(10):
        speeds.answered(0, True, 1, 1, 0.001, 0.002)
    for _ in range(100_000):
        speeds.sent()
    hedges = 0
    while speeds.hedge_after_s(0, decode=True) is not None:
        speeds.hedged(1)
        hedges += 1
    assert hedges <= 20


def test_where_a_part_is_left_out_its_other_experts_are_asked_for_elsewhere() -> None:
    world, (hidden_TH, index_TK, weight_TK) = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher(policy="degrade")
    world.fail = lambda group, _call: LinkBroken("gone") if group in (1, 2) else None
    step = StepContext(1)
    got_TH = dispatcher(step, 0, hidden_TH, index_TK, weight_TK)
    left = set(world.infos[0].holdings[0])
    kept_TK = torch.where(torch.isin(index_TK, torch.tensor(sorted(left))), weight_TK, 0.0)
    assert torch.allclose(got_TH, wanted(hidden_TH, index_TK, kept_TK), atol=1e-5)
    assert {e.expert for e in step.missing} == set(index_TK.flatten().tolist()) - left


def test_hedges_have_a_budget_and_slow_groups_a_price() -> None:
    speeds = Speeds()
    assert speeds.hedge_after_s(0, decode=True) is None
    for _ in range(20):
        for group, each_s in ((0, 0.001), (1, 0.010)):
            speeds.answered(group, True, 4, 4, 4 * each_s, 4 * each_s + 0.001)
    for _ in range(100):
        speeds.sent()
    delay_s = speeds.hedge_after_s(1, decode=True)
    assert delay_s is not None
    assert 0.015 <= delay_s < 0.1
    speeds.hedged(5)
    assert speeds.hedge_after_s(1, decode=True) is None
    assert speeds.cost()[1] == pytest.approx(10.0)
    assert speeds.lost_after_s(0, 4) == 1.0
    assert speeds.lost_after_s(7, 4) > 1.0, "nothing is known of it"
    speeds.gone(1)
    assert speeds.cost() == {}


def test_experts_without_a_living_copy_fail_at_once_where_that_is_the_policy() -> None:
    world = World(2)
    world.dead = {1}
    began_s = time.monotonic()
    with pytest.raises(Unavailable, match=r"experts .* of MoE layer 0 did not answer:"):
        world.dispatcher(group_wait_s=30.0, policy="fail")(StepContext(1), 0, *batch(8))
    assert time.monotonic() - began_s < 2.0


def test_experts_without_a_living_copy_are_left_out_and_named_where_that_is_the_policy() -> None:
    world, (hidden_TH, index_TK, weight_TK) = World(2), batch(8)
    world.dead = {1}
    step = StepContext(1)
    got_TH = world.dispatcher(group_wait_s=30.0, policy="degrade")(step, 0, hidden_TH, index_TK, weight_TK)
    lost = set(world.infos[1].holdings[0])
    kept_TK = torch.where(torch.isin(index_TK, torch.tensor(sorted(lost))), 0.0, weight_TK)
    assert torch.allclose(got_TH, wanted(hidden_TH, index_TK, kept_TK), atol=1e-5)
    assert {(e.layer, e.expert) for e in step.missing} == {(0, e) for e in set(index_TK.flatten().tolist()) & lost}
    assert all(event.kind == "failover" for event in step.events)


def test_nothing_is_left_out_while_another_copy_lives() -> None:
    world, given_ = World(3, copies=2), batch(8)
    dispatcher = world.dispatcher(policy="degrade")
    world.fail = lambda group, _call: LinkBroken("gone") if group == 1 else None
    step = StepContext(1)
    assert torch.allclose(dispatcher(step, 0, *given_), wanted(*given_), atol=1e-5)
    assert step.missing == []


def fed(speeds: Speeds, group: int, beside_s: float, times: int = 40) -> None:
    for _ in range(times):
        speeds.answered(group, True, 8, 4, 0.0004, 0.0004 + beside_s)


def test_a_group_that_hardly_runs_is_not_asked_although_it_computes_as_fast() -> None:
    speeds, copies = Speeds(), LayerCopies([(0, 1)] * 6)
    for group, beside_s in ((0, 0.0005), (1, 0.0006)):
        fed(speeds, group, beside_s)
    assert speeds.cost() in ({}, {0: 1.0, 1: 1.0})
    assert speeds.handicaps() == {}
    fed(speeds, 1, 0.009)
    assert speeds.handicaps()[1] == pytest.approx(85, rel=0.2), "9 ms are 85 experts of 0.1 ms"
    chosen_E = copies.choose(np.arange(6), True, speeds.cost(), speeds.handicaps())
    assert chosen_E.tolist() == [0] * 6
    assert copies.choose(np.arange(6), False, {}, speeds.handicaps()).tolist() != [0] * 6, "prefill computes for long"
    only = LayerCopies([(1,), (0, 1)])
    assert only.choose(np.arange(2), True, speeds.cost(), speeds.handicaps()).tolist() == [1, 0]


def test_it_is_forgiven_now_and_then_and_soon_trusted_again() -> None:
    speeds = Speeds()
    fed(speeds, 0, 0.0005)
    fed(speeds, 1, 0.009)
    forgiven = 0
    for _ in range(4096):
        speeds.cost()
        forgiven += not speeds.handicaps()
    assert forgiven == 4
    fed(speeds, 1, 0.0005, times=12)
    assert speeds.handicaps() == {}


def test_a_way_that_is_a_little_longer_is_no_handicap() -> None:
    speeds = Speeds()
    fed(speeds, 0, 0.0001)
    fed(speeds, 1, 0.0008)
    assert speeds.handicaps() == {}
