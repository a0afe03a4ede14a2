"""Deadlines where more comes than can be served: who is still served, and who waits."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cluster.engine.scheduler import Share
from tests.scheduling import World
from tests.unit.test_scheduler import numbered


def takes(shares: Sequence[Share]) -> float:
    """Seconds of a step: weights are read, and each token computed."""
    return 0.05 + 0.002 * sum(len(share.ids) for share in shares)


def test_who_is_too_late_comes_behind_all_who_are_not() -> None:
    world = World(step_s=takes, max_running=1)
    first = world.add(numbered(100), 30)
    while first not in world.first or first.num_generated < 28:
        world.step()  # what tokens, steps and answers take is known when it has ended
    world.run(10)
    busy = world.add(numbered(40, 500), 2)
    world.step()
    late, usual = world.add(numbered(400, 1000), 30, deadline_s=1.5), world.add(numbered(400, 2000), 30)
    in_time = world.add(numbered(400, 3000), 30, deadline_s=6.0)
    world.run(1000)
    assert sorted((busy, late, usual, in_time), key=world.first.__getitem__) == [busy, in_time, usual, late]


def test_what_short_prompts_take_says_nothing_of_long_ones() -> None:
    world = World(20_000, 16, step_s=lambda shares: 0.05 + 0.0007 * sum(len(share.ids) for share in shares))
    for number in range(40):
        world.add(numbered(6, 1000 * number), 1)
        world.step()
    long = world.add(numbered(20_000, 10**6), 1, deadline_s=120.0)
    for number in range(100, 10_000):
        if long in world.first:
            break
        world.add(numbered(90, 10**7 + 1000 * number), 1)
        world.step()
    assert world.now_s < long.due_s, "which was never too late"


def test_where_more_comes_than_can_be_served_short_prompts_hardly_wait_and_most_long_ones_are_in_time() -> None:
    came, ended, random_ = {}, {}, random.Random(random.getrandbits(64))
    world = World(20_000, 16, step_s=lambda shares: 0.05 + 0.0024 * sum(len(share.ids) for share in shares))
    next_short_s = next_long_s = world.now_s
    ends_s, unique = world.now_s + 400, iter(range(0, 10**9, 10_000))
    while world.now_s < ends_s:
        while next_short_s <= world.now_s:
            came[world.add(numbered(128, next(unique)), 32, deadline_s=120.0)] = next_short_s
            next_short_s += random_.expovariate(1.0)
        while next_long_s <= world.now_s:
            came[world.add(numbered(2000, next(unique)), 32, deadline_s=120.0)] = next_long_s
            next_long_s += 5.0
        before = set(world.pasts)
        world.step()
        ended.update(dict.fromkeys(before - set(world.pasts), world.now_s))
        for item in [item for item in world.pasts if world.now_s > came[item] + 120.0]:
            world.remove(item)
    over = [item for item in came if came[item] + 120.0 < ends_s]
    done = {item for item in over if item in ended}
    long = [item for item in over if len(item.request.prompt_ids) == 2000]
    assert all(item in done for item in over if item not in long)
    assert sum(item in done for item in long) >= 0.55 * len(long)
    waits = sorted(ended[item] - came[item] for item in done if item not in long)
    assert waits[int(0.99 * len(waits))] < 28.0, "with the answer, which takes two thirds of that"
