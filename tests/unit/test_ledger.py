"""The ledger's arithmetic: parts neither overlap nor leave anything out, whoever comes and goes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.telemetry.account import MAX_EVENTS, MAX_WINDOWS, RequestAccount, StepEvent
from cluster.telemetry.critical import Answer, account
from cluster.telemetry.ledger import GROUP_STAGES, OWN_STAGES, Ledger, Stage

seconds = st.floats(0.0, 2.0)


@st.composite
def waits(draw: st.DrawFn) -> list[Answer]:
    """A router that takes answers one after another, each there already or waited for, with some work between."""
    now_s, found = 10.0, []
    for group in range(draw(st.integers(1, 5))):
        from_s = now_s
        answered_s = 10.0 + draw(seconds)
        failed = draw(st.booleans()) and draw(st.booleans())
        until_s = max(from_s, answered_s) + draw(st.floats(0.0, 0.01))
        said = [draw(seconds) for _ in range(3)]  # clocks of groups may claim anything
        found.append(Answer(group, answered_s, from_s, until_s, *said, failed=failed))
        now_s = until_s + draw(st.floats(0.0, 0.1))
    return found


@given(waits())
def test_waiting_is_booked_once_and_wholly(answers: list[Answer]) -> None:
    ledger = Ledger()
    account(ledger, 3, answers)
    waited_s = sum(answer.wait_until_s - answer.wait_from_s for answer in answers)
    assert ledger.total_s() == pytest.approx(waited_s, abs=1e-9)
    assert all(value >= 0 for _, value in ledger.items())
    failed_s = sum(answer.wait_until_s - answer.wait_from_s for answer in answers if answer.failed)
    assert ledger.seconds(Stage.FAILOVER) == pytest.approx(failed_s, abs=1e-9)
    layers_s = sum(item.worst_layer_s for item in ledger.groups())
    assert layers_s == pytest.approx(waited_s, abs=1e-9), "one layer only: all of it is that layer's"


def test_the_first_answer_explains_the_wait_and_the_last_one_is_the_straggler() -> None:
    ledger = Ledger()
    fast = Answer(0, 0.010, 0.0, 0.0101, queue_s=0.001, compute_s=0.006)
    slow = Answer(1, 0.050, 0.0101, 0.0502, queue_s=0.002, compute_s=0.045)
    account(ledger, 0, [fast, slow])
    by_group = {item.group: item.seconds for item in ledger.groups()}
    assert by_group[0] == pytest.approx({"wire": 0.003, "expert.queue": 0.001, "expert.compute": 0.006})
    assert by_group[1] == pytest.approx({"wire": 0.0002, "expert.straggler": 0.040})


def test_a_load_in_the_straggler_is_a_cold_load() -> None:
    ledger = Ledger()
    account(ledger, 2, [Answer(0, 0.01, 0.0, 0.01), Answer(1, 0.06, 0.01, 0.06, compute_s=0.01, load_s=0.045)])
    spent = ledger.spent()
    assert spent["expert.cold_load"] == pytest.approx(0.045)
    assert spent["expert.straggler"] == pytest.approx(0.005)


def test_what_was_hidden_behind_the_routers_own_work_is_not_booked() -> None:
    ledger = Ledger()
    account(ledger, 0, [Answer(0, 0.010, 0.008, 0.010, queue_s=0.001, compute_s=0.006)])
    assert ledger.spent() == pytest.approx({"expert.compute": 0.002})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_instant_of_a_request_is_in_one_part(seed: int) -> None:
    """Requests come, wait, take part in some steps, lose their place, and end; a model clock ticks through it."""
    rng = random.Random(seed)
    total = Ledger()
    now_s = 100.0
    live: dict[int, RequestAccount] = {}
    done: list[RequestAccount] = []
    names = iter(range(10_000))
    for _ in range(rng.randrange(5, 60)):
        for _ in range(rng.randrange(3)):
            live[next(names)] = RequestAccount(now_s)
        now_s += rng.choice((0.0, rng.random()))
        members = {name for name in live if rng.random() < 0.8}
        for name in members:
            if not live[name].inside:
                live[name].enter(total, now_s)
        for _ in range(rng.randrange(1, 6)):
            spent_s = rng.random() * 0.2
            now_s += spent_s
            if rng.random() < 0.5:
                total.add(rng.choice(OWN_STAGES), spent_s)
            else:
                group, layer = rng.randrange(4), rng.randrange(7)
                total.wait(group, layer, rng.choice(GROUP_STAGES), spent_s)
                total.called(group, 3, 100)
        for name in members:
            if rng.random() < 0.7:
                live[name].token(total, now_s)
        for name in list(live):
            if rng.random() < 0.1:
                live[name].end(total, now_s)
                done.append(live.pop(name))
        # Whoever is to be in the next step stays inside; the others leave now, before the clock ticks on.
        for name in list(members):
            if name in live:
                live[name].leave(total, now_s)
    for item in done:
        assert item.ended_s is not None
        assert item.total().total_s() == pytest.approx(item.ended_s - item.arrived_s, abs=1e-6)
        assert len(item.windows) <= MAX_WINDOWS
        assert sum(window.tokens for window in item.windows) <= max(0, len(item.tokens) - 1)


def test_a_request_that_stays_in_the_batch_is_booked_by_differences() -> None:
    total = Ledger()
    total.add(Stage.TRUNK, 5.0)  # before it came
    item = RequestAccount(1.0)
    item.enter(total, 1.5)
    now_s = 1.5
    for _ in range(100):
        total.add(Stage.TRUNK, 0.06)
        total.wait(1, 4, Stage.STRAGGLER, 0.04)
        now_s += 0.1
        item.token(total, now_s)
    item.end(total, now_s)
    total.add(Stage.TRUNK, 5.0)  # after it went
    assert item.total().spent() == pytest.approx({"queue": 0.5, "trunk": 6.0, "expert.straggler": 4.0})
    assert item.queue.spent() == pytest.approx({"queue": 0.5})
    assert item.prefill.spent() == pytest.approx({"trunk": 0.06, "expert.straggler": 0.04})
    assert sum(window.seconds["trunk"] for window in item.windows) == pytest.approx(5.94)
    assert sum(window.tokens for window in item.windows) == 99
    assert {(window.group, window.layer) for window in item.windows} == {(1, 4)}
    [group] = item.decode.groups()
    assert (group.group, group.worst_layer) == (1, 4)


def test_windows_stay_few_and_lose_nothing() -> None:
    total = Ledger()
    item = RequestAccount(0.0)
    item.enter(total, 0.0)
    now_s = 0.0
    for number in range(4000):
        gap_s = 3.0 if number == 1234 else 0.04
        total.add(Stage.TRUNK, gap_s)
        now_s += gap_s
        item.token(total, now_s)
    item.end(total, now_s)
    assert len(item.windows) <= MAX_WINDOWS
    assert sum(window.tokens for window in item.windows) == 3999
    assert sum(window.seconds["trunk"] for window in item.windows) == pytest.approx(now_s - 0.04)
    assert max(window.max_gap_s for window in item.windows) == pytest.approx(3.0)
    for before, after in zip(item.windows, item.windows[1:], strict=False):
        assert before.end_s <= after.start_s + 1e-9


def test_waiting_for_a_turn_while_decoding_is_in_its_window() -> None:
    total = Ledger()
    item = RequestAccount(0.0)
    item.enter(total, 0.0)
    total.add(Stage.TRUNK, 0.1)
    item.token(total, 0.1)
    item.leave(total, 0.1)
    item.enter(total, 0.7)
    total.add(Stage.TRUNK, 0.1)
    item.token(total, 0.8)
    item.end(total, 0.8)
    assert item.decode.spent() == pytest.approx({"turn": 0.6, "trunk": 0.1})
    assert item.windows[0].seconds == pytest.approx({"turn": 0.6, "trunk": 0.1})


def test_who_waits_behind_a_step_that_fails_over_waits_for_that() -> None:
    item = RequestAccount(1.0)
    item.note(StepEvent("failover", 0.5, 1.0, group=2, layer=3))  # half of it before the request came
    item.note(StepEvent("cold_load", 1.4, 0.3, group=1, layer=0, expert=5))  # a part of it at the same time
    item.enter(Ledger(), 2.0)
    spent = item.queue.spent()
    assert spent == pytest.approx({"failover": 0.5, "expert.cold_load": 0.2, "queue": 0.3})
    assert [(event.kind, event.seconds) for event in item.events] == [
        ("failover", pytest.approx(0.5)),
        ("cold_load", pytest.approx(0.2)),
    ]


def test_who_loses_its_turn_to_a_failover_while_decoding_has_that_in_its_window() -> None:
    total = Ledger()
    item = RequestAccount(0.0)
    item.enter(total, 0.0)
    item.token(total, 0.1)
    item.leave(total, 0.1)
    item.note(StepEvent("failover", 0.2, 0.5, group=1, layer=2))
    item.enter(total, 0.8)
    total.add(Stage.TRUNK, 0.1)
    item.token(total, 0.9)
    item.end(total, 0.9)
    assert item.windows[0].seconds == pytest.approx({"failover": 0.5, "turn": 0.2, "trunk": 0.1})
    assert item.decode.spent() == pytest.approx({"failover": 0.5, "turn": 0.2, "trunk": 0.1})


def test_the_longest_events_are_kept() -> None:
    item = RequestAccount(0.0)
    item.enter(Ledger(), 0.0)
    for number in range(100):
        item.note(StepEvent("cold_load", float(number), float(number % 50)))
    assert len(item.events) == MAX_EVENTS
    assert min(event.seconds for event in item.events) >= 42


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), seconds), max_size=30), st.integers(0, 30))
def test_differences_and_sums_agree(adds: list[tuple[int, int, float]], cut: int) -> None:
    whole, total = Ledger(), Ledger()
    for number, (group, layer, spent_s) in enumerate(adds):
        if number == cut:
            seen = total.copy()
        total.wait(group, layer, Stage.WIRE, spent_s)
        total.add(Stage.COMBINE, spent_s)
        whole.wait(group, layer, Stage.WIRE, spent_s)
        whole.add(Stage.COMBINE, spent_s)
    if cut < len(adds):
        later = total.since(seen)
        seen.absorb(later)
        assert dict(seen.items()) == pytest.approx(dict(whole.items()))
        assert seen.total_s() == pytest.approx(whole.total_s())
