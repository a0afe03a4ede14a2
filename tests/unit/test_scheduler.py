from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.engine.scheduler import BACKLOG_PART, FAIR_PART, STRETCH, Share
from cluster.errors import Overloaded
from tests.scheduling import NEVER, World


def answer(prompt: Sequence[int], new: int) -> list[int]:
    """What the model makes of a prompt alone (but for the last token, which nobody asks the scheduler to keep)."""
    past, tokens = 0, list(prompt)
    for token in prompt:
        past = hash((past, token)) & 0xFFFFFFFF
    while len(tokens) < len(prompt) + new - 1:
        tokens.append(past % 7)
        past = hash((past, tokens[-1])) & 0xFFFFFFFF
    return tokens


class Families:
    """Prompts want the experts of their family, the first token: so many seconds of loads."""

    def __init__(self, cold: dict[int, float]) -> None:
        self.cold = cold

    def need(self, prompt_ids: Sequence[int]) -> int:
        return prompt_ids[0]

    def cold_bytes(self, need: int, beside: Sequence[int] = ()) -> float:
        return 0.0 if need in beside else self.cold[need] * 1e6

    def seconds(self, num_bytes: float) -> float:
        return num_bytes / 1e6


def test_prompts_that_want_the_same_cold_experts_go_together() -> None:
    families = Families({1: 0.5, 2: 0.5})
    world = World(colds=families, step_token_budget=16, prefill_chunk=16)
    world.add([1, *numbered(7)], 1)
    world.step()  # what a token takes is known now
    items = [world.add([family, number, *numbered(6)], 1) for number, family in enumerate([1, 2, 1, 2])]
    order = []
    while world.pasts:
        order.append([share.sequence.request.prompt_ids[0] for share in world.step()])
    assert order == [[1, 1], [2, 2]]
    assert [item.cold_bytes for item in items] == [0.5 * 1e6] * 4


def test_whose_experts_are_there_goes_before_who_has_waited_a_little_longer() -> None:
    world = World(colds=Families({1: 0.5, 2: 0.5, 3: 0.0}), step_token_budget=16, prefill_chunk=16)
    world.add([3, *numbered(7)], 1)
    world.step()
    for family in (1, 2, 3):
        world.add([family, 50, *numbered(6)], 1)
    order = []
    while world.pasts:
        order.append([share.sequence.request.prompt_ids[0] for share in world.step()])
    assert order == [[1, 3], [2]], "who has waited longest of all keeps its part"


def numbered(count: int, first: int = 0) -> range:
    """A prompt that has no prefix in common with another one."""
    return range(first, first + count)


requests = st.tuples(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2), st.integers(0, 3))


@settings(max_examples=120, deadline=None)
@example(
    [(1, 1, 0, 1), (1, 1, 0, 1), (6, 1, 0, 0), (23, 8, 1, 0), (6, 1, 0, 0), (26, 1, 0, 0)], 3, 3, 1, 5, 1, False, 3.0, 0
)
@given(
    st.lists(requests, min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 20),
    st.booleans(),
    st.sampled_from([0.0, 0.01, 3.0]),
    st.sampled_from([0, 1, 10, 500]),
)
def test_every_token_goes_through_once_in_order_within_all_limits(
    sizes: list[tuple[int, int, int, int]],
    max_running: int,
    budget: int,
    chunk: int,
    block_size: int,
    more_blocks: int,
    caching: bool,
    step_s: float,
    history: int,
) -> None:
    largest = max(prompt + new for prompt, new, _, _ in sizes)
    limits = {"max_running": max_running, "step_token_budget": budget, "prefill_chunk": chunk}
    limits["history_tokens"] = history
    num_blocks = -(-largest // block_size) + more_blocks
    world = World(num_blocks, block_size, step_s, prefix_caching=caching, **limits)
    items = []
    for prompt, new, kind, pause in sizes:
        ids = [kind, *[0] * (prompt - 1)]
        items.append((world.add(ids, new, deadline_s=NEVER if kind else 20.0), ids, new))
        for _ in range(pause):
            if world.pasts:
                world.step()
    total = sum(prompt + new for prompt, new, _, _ in sizes)
    world.run(max_steps=20 * total)
    assert all(item.tokens == answer(ids, new) for item, ids, new in items)
    assert world.scheduler.num_running == world.scheduler.num_waiting == world.pool.num_used == 0
    assert caching or world.pool.num_cached == 0


def test_ten_thousand_lives_leave_no_block_behind() -> None:
    dice = random.Random(5)
    world = World(60, 4, 0.01, max_running=8, step_token_budget=64, prefill_chunk=48)
    lives = cancelled = failed = 0
    systems = [[dice.randrange(7) for _ in range(dice.randrange(4, 30))] for _ in range(6)]
    while lives < 10_000:
        while len(world.pasts) < dice.randrange(2, 14) and lives < 10_000:
            prompt = [*dice.choice(systems), *(dice.randrange(7) for _ in range(dice.randrange(1, 12)))]
            world.add(prompt, dice.choice([1, 1, 1, 1, 5, 150]), dice.choice([NEVER, 5.0]))
            lives += 1
        if dice.random() < 0.1:
            world.remove(dice.choice(list(world.pasts)))
            cancelled += 1
        if world.pasts:
            fails = dice.random() < 0.01
            failed += len(world.step(fails)) * fails
            world.ends = {item: end for item, end in world.ends.items() if item in world.pasts}
    world.run(max_steps=2000)
    pool = world.pool
    assert pool.num_used == 0
    assert pool.num_cached + pool.num_free == pool.num_blocks
    assert min(cancelled, failed, world.scheduler.preemptions, pool.hit_tokens, pool.evicted) > 100


def test_a_short_prompt_does_not_wait_behind_a_long_one() -> None:
    world = World(step_token_budget=64, prefill_chunk=32)
    long = world.add(numbered(4000), 4)
    world.step()
    shorts = [world.add(numbered(12, 10_000 * i), 2) for i in (1, 2, 3)]
    world.step()
    assert all(world.first[short] == 2 for short in shorts)
    stream = world.add(numbered(4, 50_000), 1000)
    for number in range(20):
        world.step()
        short = world.add(numbered(24, 100_000 + 100 * number), 1)
        world.step()
        assert world.first[short] == world.steps, "three quarters of the chunk beside a stream"
    assert long.num_generated == 0
    assert stream.num_generated == 40


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(0, 3000), st.integers(1, 200), st.integers(8, 64), st.booleans())
def test_the_wait_for_a_first_token_depends_on_ones_own_length(
    longs: int, before: int, short: int, chunk: int, streams: bool
) -> None:
    world = World(step_s=0.02, step_token_budget=64, prefill_chunk=chunk)
    if streams:
        world.add(numbered(1, 9_000_000), 10_000)
    for number in range(longs):
        world.add(numbered(4000, 10_000 * (number + 1)), 1)
    for _ in range(before // 64):
        world.step()
    item = world.add(numbered(short, 8_000_000), 1)
    budget = chunk if streams else 64
    for _ in range(short // (budget - -(-budget // FAIR_PART)) + 2):
        world.step()
    assert item in world.first


@pytest.mark.parametrize("places", [64, 3, 1])
def test_a_long_prompt_is_not_starved_by_short_ones(places: int) -> None:
    world = World(step_token_budget=32, prefill_chunk=16, max_running=places)
    for number in range(50):
        world.add(numbered(16, 1000 * number), 2)
    long = world.add(numbered(800, 1_000_000), 1)
    second = world.add(numbered(400, 2_000_000), 1)
    number = 50
    while second not in world.first or long not in world.first:
        for _ in range(2):  # more than the steps can take
            number += 1
            world.add(numbered(16, 1000 * number), 2)
        world.step()
        assert world.steps < 50 * 4 + 800 // (16 // FAIR_PART) + 400 // (16 // FAIR_PART) + 100
    assert world.scheduler.num_waiting > 20


def test_who_waits_longest_gets_a_quarter_of_each_steps_prefill() -> None:
    world = World(step_token_budget=11, prefill_chunk=10)
    world.add([1], 1000)
    world.step()
    long = world.add(numbered(2000, 10_000), 1)
    got = []
    for number in range(100):
        world.add(numbered(30, 100_000 + 1000 * number), 1)
        shares = world.step()
        got.append(sum(len(share.ids) for share in shares if share.sequence is long))
        assert sum(len(share.ids) for share in shares) == 11, "nothing is left over"
    assert set(got[1:]) == {2, 3}
    assert sum(got[1:]) in (247, 248)


def test_a_near_deadline_comes_first() -> None:
    world = World(max_running=1, step_token_budget=64)
    first = world.add(numbered(40), 2)
    world.step()
    usual, urgent = world.add(numbered(40, 1000), 1), world.add(numbered(40, 2000), 1, deadline_s=2.0)
    far = world.add(numbered(39, 3000), 1, deadline_s=500.0)
    world.run(100)
    assert sorted((first, usual, urgent, far), key=world.first.__getitem__) == [first, urgent, far, usual]


def test_a_deadline_that_has_come_near_while_waiting_comes_first() -> None:
    world = World(step_s=1.0, max_running=1)
    first = world.add([1], 14)
    world.step()
    usual, urgent = world.add(numbered(40, 1000), 1), world.add(numbered(40, 2000), 1, deadline_s=16.0)
    world.run(100)
    assert sorted((first, usual, urgent), key=world.first.__getitem__) == [first, urgent, usual]


def test_among_equals_who_came_first_goes_first() -> None:
    world = World(step_s=0.0, max_running=1)
    items = [world.add(numbered(9, 1000 * number), 1) for number in range(20)]
    world.run(100)
    assert sorted(items, key=world.first.__getitem__) == items


def test_who_came_last_gives_its_blocks_back_and_is_computed_again() -> None:
    world = World(40, 4, max_running=4, prefix_caching=0)
    first, last = world.add(numbered(8), 120), world.add(numbered(8, 100), 120)
    while not last.preemptions:
        world.step()
        assert world.steps < 200
    generated = last.num_generated
    assert generated > 0
    assert (last.running, last.computed, last.table.blocks, first.preemptions) == (False, 0, [], 0)
    late = world.add(numbered(1, 200), 1)
    while first in world.pasts:
        world.step()
    assert late not in world.first, "who has begun comes before who has not"
    world.run(200)
    assert last.tokens == answer(numbered(8, 100), 120)
    assert world.scheduler.preemptions == first.preemptions + last.preemptions == 1
    assert world.pool.asked_tokens == 8 + 8 + 1, "each prompt counts once"


def test_nobody_is_admitted_into_room_that_is_about_to_be_needed() -> None:
    world = World(8, 4)
    first, second = world.add(numbered(8), 20), world.add(numbered(8, 100), 20)
    world.step()
    assert (first.running, second.running, world.pool.num_free) == (True, False, 6)
    world.run(100)
    assert world.scheduler.preemptions == 0


def test_a_near_deadline_is_not_what_is_preempted() -> None:
    world = World(40, 4)
    usual, urgent = world.add(numbered(8), 120), world.add(numbered(8, 100), 120, deadline_s=3.0)
    world.run(500)
    assert (usual.preemptions, urgent.preemptions) == (1, 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=10), st.sampled_from([0.0, 0.05, 10.0]), st.booleans())
def test_in_the_smallest_pool_everybody_ends(lengths: list[int], step_s: float, caching: bool) -> None:
    world = World(21, 2, step_s, max_running=8, step_token_budget=16, prefix_caching=caching)
    for number, new in enumerate(lengths):
        world.add(numbered(42 - new, 1000 * number), new)
    world.run(max_steps=100 * len(lengths))


def test_a_prefix_is_shared_only_after_its_step_has_run() -> None:
    world = World(100, 4)
    first, twin = world.add(numbered(9), 3), world.add(numbered(9), 3)
    world.step()
    assert not set(first.table.blocks) & set(twin.table.blocks)
    third = world.add(numbered(9), 3)
    world.step(fails=True)
    assert world.pool.hit_tokens == 8, "of the first step"
    assert third not in world.pasts
    world.add(numbered(30, 500), 3)
    world.step(fails=True)
    world.add(numbered(30, 500), 3)
    world.step()
    assert world.pool.hit_tokens == 8
    world.add(numbered(30, 500), 3)
    world.step()
    assert world.pool.hit_tokens == 8 + 28


def test_a_full_queue_refuses_at_once() -> None:
    world = World(max_running=1, max_waiting=2)
    world.add([1], 4)
    world.add([1], 4)
    with pytest.raises(Overloaded, match=r"2 requests wait \(engine\.max_waiting\)"):
        world.add([1], 4)
    world.step()
    world.add([1], 4)


def test_a_removed_sequence_makes_room() -> None:
    world = World(2, 4, max_running=1)
    first, second = world.add(numbered(4), 4), world.add(numbered(4, 100), 4)
    assert [share.sequence for share in world.step()] == [first]
    world.remove(first)
    assert [share.sequence for share in world.step()] == [second]
    world.scheduler.remove(first)
    world.remove(second)
    world.scheduler.remove(second)
    assert world.scheduler.next_step() == []
    assert world.pool.num_used == 0


def test_what_was_computed_without_some_experts_is_nobody_else_s_prefix() -> None:
    world = World(block_size=4)
    first = world.add(numbered(12), 3)
    first.degraded = True
    world.step()
    second = world.add(numbered(12), 2)
    world.step()
    assert second.cached_tokens == 0
    world.run(20)
    third = world.add(numbered(12), 2)
    world.step()
    assert third.cached_tokens > 0, "the second one's is sound"


def prefilled(shares: list[Share]) -> int:
    return sum(len(share.ids) for share in shares if not share.decoding)


@pytest.mark.parametrize(
    ("waiting", "tokens"),
    [(20, 20), (30, 30), (31, 20), (39, 20), (60, 30), (80, 40), (5000, 40)],
)
def test_the_longer_the_queue_the_larger_the_chunks_beside_a_stream(waiting: int, tokens: int) -> None:
    world = World(step_token_budget=512, prefill_chunk=20)
    world.add([1], 1000)
    world.step()
    for number in range(5):
        world.add(numbered(waiting // 5 + (number < waiting % 5), 10_000 * (number + 1)), 1)
    assert prefilled(world.step()) == tokens


@pytest.mark.parametrize("history_tokens", [0, 1000])
def test_a_prompt_that_is_little_more_than_a_chunk_is_not_computed_in_two_steps(history_tokens: int) -> None:
    world = World(step_token_budget=512, prefill_chunk=96, history_tokens=history_tokens)
    world.add([1], 1000)
    world.step()
    item = world.add(numbered(128, 10_000), 1)
    world.step()
    assert world.first[item] == world.steps


def test_chunks_of_a_long_prompt_get_shorter_as_its_history_grows_so_that_steps_take_as_long() -> None:
    world = World(step_token_budget=512, prefill_chunk=96, history_tokens=1000)
    world.add([1], 1000)
    world.step()
    long = world.add(numbered(3000, 10_000), 1)
    costs, counts = [], []
    while long not in world.first:
        (share,) = [share for share in world.step() if not share.decoding]
        counts.append(len(share.ids))
        costs.append((3000 - share.start, len(share.ids) * (1 + share.start / 1000)))
    most = STRETCH * 96
    assert all(cost <= most for _, cost in costs)
    assert all(cost > 0.95 * most for left, cost in costs if left > BACKLOG_PART * most)
    assert counts[0] > 0.95 * most
    assert min(counts) < most / 3


def test_history_costs_nothing_extra_where_nobody_decodes() -> None:
    world = World(step_token_budget=64, prefill_chunk=8, history_tokens=10)
    world.add(numbered(640, 10_000), 1)
    assert [prefilled(world.step()) for _ in range(10)] == [64] * 10
