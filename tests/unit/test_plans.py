"""EPLB's plan, ours, and what audits say of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import InvalidArgument
from cluster.placement import audit
from cluster.placement.eplb import balanced
from cluster.placement.shape import Loads, Shape, Slots, count_copies, slot_loads
from cluster.placement.survivable import Hysteresis, survivable
from cluster.placement.windows import read_plan, read_windows
from tests.e2e.processes import last_json, run_here

# The example in the README of github.com/deepseek-ai/EPLB.
EXAMPLE = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)
EXAMPLE_PLAN = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_eplb_s_own_example_comes_out_exactly() -> None:
    shape = Shape(experts=12, slots=16, groups=8, hosts=2)
    plan = balanced(EXAMPLE, shape, expert_groups=4)
    assert plan.tolist() == EXAMPLE_PLAN
    assert audit.balancedness_per_group(EXAMPLE, plan, shape) == pytest.approx([0.8277, 0.8050], abs=1e-4)
    assert audit.balancedness_per_slot(EXAMPLE, plan) == pytest.approx([0.7056, 0.4602], abs=1e-4)


def groups_of(plan_LS: Slots, shape: Shape) -> list[list[list[int]]]:
    """Experts by layer and group."""
    each: list[list[list[int]]] = plan_LS.reshape(len(plan_LS), shape.groups, -1).tolist()
    return each


shapes = st.integers(1, 4).flatmap(
    lambda hosts: st.tuples(
        st.just(hosts),
        st.integers(1, 3).map(lambda each: each * hosts),
        st.integers(1, 6),
        st.integers(1, 24),
        st.integers(0, 2**31),
    )
)


def drawn(numbers: tuple[int, int, int, int, int]) -> tuple[Shape, Loads]:
    hosts, groups, slots_each, experts, seed = numbers
    shape = Shape(min(experts, groups * slots_each), groups * slots_each, groups, hosts)
    rng = np.random.default_rng(seed)
    loads_LE = rng.lognormal(0, 1, (3, shape.experts)) * (rng.random((3, shape.experts)) > 0.2)
    return shape, loads_LE


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_every_expert_has_a_slot_and_all_slots_are_used(numbers: tuple[int, int, int, int, int]) -> None:
    shape, loads_LE = drawn(numbers)
    for plan_LS in (balanced(loads_LE, shape), survivable(loads_LE, shape)):
        assert plan_LS.shape == (3, shape.slots)
        assert count_copies(plan_LS, shape.experts).min() >= 1
        assert slot_loads(loads_LE, plan_LS).sum(-1) == pytest.approx(loads_LE.sum(-1))


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_where_there_is_room_no_host_takes_an_expert_with_it(numbers: tuple[int, int, int, int, int]) -> None:
    shape, loads_LE = drawn(numbers)
    plan_LS = survivable(loads_LE, shape)
    lost = audit.coverage(loads_LE, plan_LS, shape)
    if shape.hosts > 1 and shape.slots >= 2 * shape.experts:
        assert [loss.experts for loss in lost] == [()] * shape.hosts
    host_of_group = shape.host_of_group()
    for layer, groups in enumerate(groups_of(plan_LS, shape)):
        copies = Counter(expert for held in groups for expert in held)
        for expert, count in copies.items():
            on = Counter(host_of_group[number] for number, held in enumerate(groups) for e in held if e == expert)
            if count <= shape.hosts:
                assert max(on.values()) == 1, f"layer {layer}: {count} copies of {expert} share a host"
            if count <= shape.groups:
                assert all(held.count(expert) <= 1 for held in groups), "twice in a group helps nobody"


@settings(max_examples=100, deadline=None)
@given(shapes)
def test_a_plan_stays_where_nothing_changes_and_moves_little_where_little_does(
    numbers: tuple[int, int, int, int, int],
) -> None:
    shape, loads_LE = drawn(numbers)
    plan_LS = survivable(loads_LE, shape)
    same_LS = survivable(loads_LE, shape, plan_LS)
    fresh, kept = (audit.balancedness_per_group(loads_LE, p, shape) for p in (plan_LS, same_LS))
    lost = [sum(loss.share for loss in audit.coverage(loads_LE, p, shape)) for p in (plan_LS, same_LS)]
    for layer in range(3):  # a first plan is greedy: where few experts have many slots, a second look may find better
        stays = np.array_equal(same_LS[layer], plan_LS[layer])
        assert stays or kept[layer] > fresh[layer] + Hysteresis().plan or lost[1] < lost[0]
    rng = np.random.default_rng(numbers[-1])
    later_LE = loads_LE * rng.lognormal(0, 0.3, loads_LE.shape)
    again_LS = survivable(later_LE, shape, plan_LS)
    assert count_copies(again_LS, shape.experts).min() >= 1
    before, after = (audit.balancedness_per_group(later_LE, p, shape) for p in (plan_LS, again_LS))
    lost = [sum(loss.share for loss in audit.coverage(later_LE, p, shape)) for p in (plan_LS, again_LS)]
    for layer in range(3):
        if not np.array_equal(again_LS[layer], plan_LS[layer]):
            assert after[layer] > before[layer] or lost[1] < lost[0], "it moved for nothing"


def test_hot_experts_are_spread_and_few_bytes_move() -> None:
    rng = np.random.default_rng(7)
    shape = Shape(experts=64, slots=128, groups=4, hosts=4)
    loads_LE = rng.lognormal(0, 1, (8, 64))
    plan_LS = survivable(loads_LE, shape)
    assert min(audit.balancedness_per_group(loads_LE, plan_LS, shape)) > 0.97
    later_LE = loads_LE * rng.lognormal(0, 0.3, loads_LE.shape)
    stale = np.mean(audit.balancedness_per_group(later_LE, plan_LS, shape))
    again_LS = survivable(later_LE, shape, plan_LS)
    assert np.mean(audit.balancedness_per_group(later_LE, again_LS, shape)) > stale
    moved, eplb = (
        sum(audit.moves(old, new, shape))
        for old, new in ((plan_LS, again_LS), (balanced(loads_LE, shape), balanced(later_LE, shape)))
    )
    assert 0 < moved < eplb / 4


def test_a_plan_that_cannot_be_survived_is_left_for_one_that_can() -> None:
    shape = Shape(experts=4, slots=8, groups=2, hosts=2)
    loads_LE = np.ones((1, 4))
    current_LS = np.array([[0, 0, 1, 1, 2, 2, 3, 3]])
    plan_LS = survivable(loads_LE, shape, current_LS)
    assert [sorted(held) for held in groups_of(plan_LS, shape)[0]] == [[0, 1, 2, 3]] * 2
    assert audit.moves(current_LS, plan_LS, shape) == [4]
    assert [len(loss.experts) for loss in audit.coverage(loads_LE, current_LS, shape)] == [2, 2]
    assert [loss.share for loss in audit.coverage(loads_LE, current_LS, shape)] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ((12, 10, 2, 2), "--slots"),
        ((12, 15, 2, 2), "--slots"),
        ((12, 16, 8, 3), "--hosts"),
        ((12, 16, 0, 1), "--groups"),
    ],
)
def test_shapes_that_cannot_be_are_refused(fields: tuple[int, int, int, int], name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Shape(*fields)


BAD: list[tuple[Any, str]] = [
    ([], "windows"),
    ({"windows": []}, "windows"),
    ({"windows": [{"load": [[1]]}]}, "window 0"),
    ({"loads": [[1, 2], [3]]}, "same number"),
    ({"loads": [[1, "x"]]}, "numbers"),
    ({"loads": [[1, -2]]}, "from 0 on"),
    ({"loads": [[1, float("nan")]]}, "finite"),
    ({"windows": [{"loads": [[1, 2]]}, {"loads": [[1, 2, 3]]}]}, "same layers"),
    ({"loads": [[1, 2]], "expert_bytes": [1, 2]}, "expert_bytes"),
]


@pytest.mark.parametrize(("content", "word"), BAD)
def test_files_of_another_form_are_refused_with_the_place(content: Any, word: str, tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InvalidArgument, match=word):
        read_windows(file)


def test_the_command_plans_scores_and_audits(tmp_path: Path) -> None:
    file, plan_file = tmp_path / "loads.json", tmp_path / "plan.json"
    later = EXAMPLE[:, ::-1].tolist()
    file.write_text(json.dumps({"windows": [{"loads": EXAMPLE.tolist()}, {"loads": later}], "expert_bytes": [10, 20]}))
    flags = ["--loads", str(file), "--groups", "8", "--slots", "16", "--hosts", "2", "--expert-groups", "4"]
    result = last_json(run_here("plan", *flags, "--json"))
    assert result["phy2log"] == EXAMPLE_PLAN
    assert result["balancedness_per_group"] == pytest.approx([0.8277, 0.8050], abs=1e-4)
    assert result["balancedness_per_group_next"] != result["balancedness_per_group"]
    assert result["bytes_moved"] == 16 * (10 + 20), "from nothing, everything has to be loaded"
    assert sum(loss["experts_lost"] for loss in result["coverage"]) == 24, "EPLB keeps copies of an expert on one host"
    plan_file.write_text(json.dumps(result))
    flags = ["--loads", str(file), "--groups", "8", "--slots", "16", "--current", str(plan_file), "--window", "1"]
    result = last_json(run_here("plan", *flags, "--mode", "survivable", "--json"))
    assert result["balancedness_per_group_next"] is None
    assert 0 < result["moves"] < 32
    assert read_plan(plan_file, 2, 12, 16).tolist() == EXAMPLE_PLAN
    assert "if this host dies" in run_here("plan", *flags).stdout
    refused = run_here("plan", *flags[:4], "--slots", "15", "--json")
    assert refused.returncode == 2
    assert "--slots" in refused.stderr
