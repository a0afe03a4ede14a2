from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cluster.core import GroupInfo, StoreFacts
from cluster.routing.coldness import Coldness

SIZE = 1000


def group(number: int, held: list[int], resident: list[int], layers: int = 2, **facts: float) -> GroupInfo:
    store = StoreFacts(
        1,
        len(resident),
        len(resident),
        expert_bytes=(SIZE,) * layers,
        resident_experts=(tuple(resident),) * layers,
        **facts,  # type: ignore[arg-type]
    )
    return GroupInfo(number, "", "x", (tuple(held),) * layers, "", "fp32", store=store)


def knows(*experts: int) -> Coldness:
    """A router whose first gate wants the same experts whatever it is asked."""
    chance_E = np.zeros(8, np.uint8)
    chance_E[list(experts)] = 255
    return Coldness(lambda _ids: chance_E.tobytes())


def test_nothing_is_cold_where_no_group_has_a_budget() -> None:
    coldness = knows(1)
    coldness.follow([GroupInfo(0, "", "x", ((0, 1),), "", "fp32")])
    coldness.called(0, np.array([1]), 1)
    assert not coldness.active
    assert coldness.need([1, 2]) is None


def test_what_is_not_in_memory_costs_its_bytes_until_it_is_called() -> None:
    coldness = knows(1, 2, 5)
    coldness.follow([group(0, [0, 1, 2, 3], [0, 1]), group(1, [4, 5, 6, 7], [4])])
    need_LE = coldness.need([9])
    assert need_LE is not None
    assert coldness.cold_bytes(need_LE) == 2 * SIZE, "2 and 5 of the first layer; nothing is known of the second"
    coldness.called(0, np.array([5, 5]), 2)
    assert coldness.cold_bytes(need_LE) == SIZE
    coldness.follow([group(0, [0, 1, 2, 3], [0, 1]), group(1, [4, 5, 6, 7], [4])])
    assert coldness.cold_bytes(need_LE) == 2 * SIZE, "the group says that it has gone again"


def test_an_expert_that_any_group_has_in_memory_is_not_cold() -> None:
    coldness = knows(1)
    coldness.follow([group(0, [0, 1], []), group(1, [0, 1], [1])])
    need_LE = coldness.need([9])
    assert need_LE is not None
    assert coldness.cold_bytes(need_LE) == 0


def test_longer_prompts_want_more_of_the_later_layers() -> None:
    coldness = knows()
    every = list(range(8))
    coldness.follow([group(0, every, [])])
    rng = np.random.default_rng(1)
    for _ in range(100):
        coldness.called(1, rng.choice(8, 2, replace=False), 1)
    coldness.follow([group(0, every, [])])
    short, long = coldness.need([1]), coldness.need(list(range(40)))
    assert short is not None
    assert long is not None
    assert coldness.cold_bytes(short) == pytest.approx(2 * SIZE, rel=0.3), "each token wants two of eight"
    assert coldness.cold_bytes(long) > 7 * SIZE


def test_what_another_prompt_brings_anyway_is_not_counted_twice() -> None:
    every = list(range(8))
    asked: dict[int, Sequence[int]] = {1: [0, 1], 2: [1, 2], 3: [6, 7]}

    def first_layer(ids: Sequence[int]) -> bytes:
        chance_E = np.zeros(8, np.uint8)
        chance_E[list(asked[ids[0]])] = 255
        return chance_E.tobytes()

    coldness = Coldness(first_layer)
    coldness.follow([group(0, every, [], loads=10.0, loads_s=2.0, loaded_bytes=8000.0)])
    one, two, three = (coldness.need([number]) for number in (1, 2, 3))
    assert one is not None
    assert two is not None
    assert three is not None
    assert coldness.cold_bytes(two, [one]) == SIZE
    assert coldness.cold_bytes(three, [one]) == 2 * SIZE
    assert coldness.cold_bytes(one, [one]) == 0
    assert coldness.seconds(2000) == pytest.approx(0.5), "loads brought 4000 bytes a second"
