from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.core import Deadline, Request, SamplingParams, StopParams
from cluster.engine.scheduler import Scheduled, Scheduler
from cluster.errors import Overloaded


def sequence(prompt: int, new: int, name: str = "r") -> Scheduled:
    ids = tuple(range(prompt))
    return Scheduled(Request(name, ids, SamplingParams(), StopParams(new), Deadline(float("inf"))))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 8)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 120),
)
def test_every_token_goes_through_once_in_order_within_all_limits(
    sizes: list[tuple[int, int]], max_running: int, budget: int, max_kv: int
) -> None:
    max_kv = max(max_kv, *(prompt + new for prompt, new in sizes))
    scheduler = Scheduler(max_running, 100, budget, max_kv)
    sequences = [sequence(*size) for size in sizes]
    for item in sequences:
        scheduler.add(item)
    seen: dict[int, list[int]] = defaultdict(list)
    sampled: dict[int, int] = defaultdict(int)
    steps = 0
    while shares := scheduler.next_step():
        steps += 1
        assert steps < 5000
        assert sum(len(share.ids) for share in shares) <= budget
        assert len(shares) <= max_running
        kinds = [share.sequence.decoding for share in shares]
        assert kinds == sorted(kinds, reverse=True), "decode tokens come first"
        running = {id(share.sequence): share.sequence.max_tokens for share in shares}
        assert sum(running.values()) <= max_kv
        for share in shares:
            key = id(share.sequence)
            seen[key].extend(share.ids)
            if share.samples:
                sampled[key] += 1
                if sampled[key] == share.sequence.request.stop.max_new_tokens:
                    scheduler.remove(share.sequence)
                else:
                    scheduler.sampled(share.sequence, 1000 + sampled[key])
    assert scheduler.num_running == scheduler.num_waiting == 0
    for item in sequences:
        new = item.request.stop.max_new_tokens
        assert sampled[id(item)] == new
        assert seen[id(item)] == [*item.request.prompt_ids, *(1000 + i for i in range(1, new))]


def test_a_full_queue_refuses_at_once() -> None:
    scheduler = Scheduler(1, 2, 8, 100)
    for _ in range(2):
        scheduler.add(sequence(4, 4))
    with pytest.raises(Overloaded, match="2 requests wait"):
        scheduler.add(sequence(4, 4))


def test_a_removed_sequence_makes_room() -> None:
    scheduler = Scheduler(1, 2, 8, 100)
    first, second = sequence(4, 4), sequence(4, 4)
    scheduler.add(first)
    scheduler.add(second)
    assert [s.sequence for s in scheduler.next_step()] == [first]
    scheduler.remove(first)
    assert [s.sequence for s in scheduler.next_step()] == [second]
    scheduler.remove(second)
    scheduler.remove(second)
    assert scheduler.next_step() == []
