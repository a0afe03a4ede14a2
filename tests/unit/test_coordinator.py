from __future__ import annotations

import pytest

from cluster.control.coordinator import MISSES, Coordinator
from cluster.core import GroupInfo
from cluster.errors import Unavailable


class Groups:
    """Two groups of a model with one layer of four experts."""

    def __init__(self) -> None:
        self.down: set[int] = set()
        self.born = {0: "a", 1: "b"}

    def ask(self, group: int) -> GroupInfo:
        if group in self.down:
            raise Unavailable("no answer")
        held = ((0, 1),) if group == 0 else ((2, 3),)
        return GroupInfo(group, "", self.born[group], held, "f", "fp32")


def test_the_table_follows_what_the_groups_say() -> None:
    groups = Groups()
    coordinator = Coordinator([4], [0, 1], groups.ask, epoch=3)
    coordinator.poll()
    first = coordinator.membership().table
    assert first.order == (3, 1)
    assert first.owners == (((0,), (0,), (1,), (1,)),)
    coordinator.poll()
    assert coordinator.membership().table == first, "nothing changed, no new version"

    groups.down = {1}
    for _ in range(MISSES - 1):
        coordinator.poll()
    assert coordinator.membership().table == first, "one lost answer is no death"
    coordinator.poll()
    second = coordinator.membership().table
    assert second.order == (3, 2)
    assert [e.expert for e in second.uncovered()] == [2, 3]

    groups.down, groups.born[1] = set(), "c"
    coordinator.poll()
    assert coordinator.membership().table.order == (3, 3)
    assert coordinator.membership().groups[1].incarnation == "c"
    coordinator.close()


def test_start_names_the_groups_that_do_not_answer() -> None:
    groups = Groups()
    groups.down = {1}
    coordinator = Coordinator([4], [0, 1], groups.ask, epoch=1)
    with pytest.raises(Unavailable, match=r"groups \[1\] did not answer"):
        coordinator.start(timeout_s=0.1)
    coordinator.close()
