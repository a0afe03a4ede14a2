from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import PlacementTable
from cluster.errors import ConfigError
from cluster.placement.planner import owners_from_holdings, plan_blocks


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.data())
def test_blocks_hold_every_expert_once_and_evenly(per_layer: list[int], data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, min(per_layer)))
    plan = plan_blocks(per_layer, num_groups)
    for layer, count in enumerate(per_layer):
        held = [expert for group in plan for expert in group[layer]]
        assert sorted(held) == list(range(count))
        sizes = [len(group[layer]) for group in plan]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
    owners = owners_from_holdings(per_layer, dict(enumerate(plan)))
    assert not PlacementTable(1, 1, owners).uncovered()
    assert all(expert in plan[groups[0]][0] for expert, groups in enumerate(owners[0]))


def test_more_groups_than_experts_is_refused_with_numbers() -> None:
    with pytest.raises(ConfigError, match=r"groups: got 9; a layer of this model has 8 experts"):
        plan_blocks([16, 8], 9)


def test_experts_that_nobody_holds_are_uncovered() -> None:
    owners = owners_from_holdings([3, 2], {4: ((0, 2), (1,))})
    table = PlacementTable(1, 1, owners)
    assert [(e.layer, e.expert) for e in table.uncovered()] == [(0, 1), (1, 0)]
