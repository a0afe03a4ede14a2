"""Who makes room, and what is loaded ahead: numbers only."""

from __future__ import annotations

import random

import numpy as np

from cluster.core import ExpertId, Order
from cluster.experts.residency import Move, Residency

LAYERS, EXPERTS = 3, 8


def residency(predicts: bool = True) -> Residency:
    return Residency(np.ones((LAYERS, EXPERTS), bool), np.zeros(LAYERS, np.int64), predicts)


def order(layer: int, **chances: float) -> Order:
    return Order(1, layer, bytes(int(255 * chances.get(f"e{expert}", 0)) for expert in range(EXPERTS)))


def none_free(_layer: int) -> bool:
    return False


def test_of_equally_popular_experts_the_one_whose_layer_comes_last_makes_room() -> None:
    told = residency()
    for now_s, layer in enumerate([0, 1, 2] * 60 + [0]):
        told.called(layer, np.array([0, 1]), float(now_s))
    for layer in range(LAYERS):
        told.came(ExpertId(layer, 0))
    assert told.victim(1) == ExpertId(0, 0), "layer 0 was called a moment ago"
    told.pin(0, np.array([0]))
    assert told.victim(1) == ExpertId(2, 0)
    told.unpin()
    told.called(1, np.array([0]), 190.0)
    assert told.victim(2) == ExpertId(1, 0)


def test_the_rare_go_before_the_popular() -> None:
    told = residency()
    for now_s in range(40):
        told.called(0, np.array([0, 1] if now_s % 4 == 0 else [0]), float(now_s))
    for expert in (0, 1, 2):
        told.came(ExpertId(0, expert))
    assert [told.victim(0) for _ in range(3)] == [ExpertId(0, 2), ExpertId(0, 1), ExpertId(0, 0)]


def test_the_nearest_layers_likely_experts_are_loaded_first() -> None:
    told = residency()
    told.called(0, np.array([0]), 0.0)
    told.ordered(order(2, e1=0.9))
    told.ordered(order(1, e3=0.6, e4=0.9, e5=0.1))
    moves = []
    while (move := told.next_ahead(0.0, 0.001, lambda _: True)) is not None:
        moves.append(move)
        told.came(move.key)
    assert moves == [Move(ExpertId(layer, expert), None) for layer, expert in ((1, 4), (1, 3), (2, 1))]


def test_nobody_makes_room_for_what_is_wanted_later_than_itself() -> None:
    told = residency()
    for now_s in range(30):
        for layer in range(LAYERS):
            told.called(layer, np.array([0, 1]), now_s + layer / LAYERS)
    told.came(ExpertId(0, 0))  # popular, and its layer comes next
    told.ordered(order(1, e7=0.4))
    assert told.next_ahead(30.0, 0.001, none_free) is None
    told.came(ExpertId(2, 5))  # never called, and its layer comes last
    told.called(2, np.array([0, 1]), 30.0)
    told.ordered(order(0, e7=0.99))
    assert told.next_ahead(30.0, 0.001, none_free) == Move(ExpertId(0, 7), ExpertId(2, 5))


def test_what_a_call_named_is_no_longer_ordered() -> None:
    told = residency()
    told.called(0, np.array([0]), 0.0)
    told.ordered(order(1, e3=0.9))
    assert told.were_likely(1, np.array([3])) == 0
    told.called(1, np.array([2, 3]), 1.0)
    assert told.were_likely(1, np.array([2, 3])) == 1
    assert told.next_ahead(1.0, 0.001, lambda _: True) is None


def test_what_is_only_possible_waits_for_time_to_load_it() -> None:
    told = residency()
    for now_s in range(12):
        told.called(now_s % LAYERS, np.array([0]), float(now_s))
    told.ordered(order(0, e3=0.4))
    assert told.next_ahead(11.5, 5.0, lambda _: True) != Move(ExpertId(0, 3), None), "it would come too late"
    told.ordered(order(0, e3=0.4))
    assert told.next_ahead(11.5, 0.1, lambda _: True) == Move(ExpertId(0, 3), None)
    told.ordered(order(0, e3=0.4))
    assert told.next_ahead(99.0, 5.0, lambda _: True) == Move(ExpertId(0, 3), None), "nobody is about to call"


def test_loads_ahead_come_to_an_end_whatever_was_called_and_ordered() -> None:
    for _ in range(50):
        told = residency()
        resident = set()
        for layer in range(LAYERS):
            for expert in random.sample(range(EXPERTS), 4):
                told.came(ExpertId(layer, expert))
                resident.add(ExpertId(layer, expert))
        for now_s in range(random.randrange(1, 30)):
            told.called(now_s % LAYERS, np.array(random.sample(range(EXPERTS), 3)), float(now_s))
        for layer in range(LAYERS):
            told.ordered(Order(1, layer, random.randbytes(EXPERTS)))
        count = 0
        while (move := told.next_ahead(100.0, 0.001, none_free)) is not None:
            count += 1
            assert move.victim is not None
            assert move.victim in resident
            assert move.key not in resident
            resident.remove(move.victim)
            resident.add(move.key)
            told.went(move.victim)
            told.came(move.key)
        assert count <= LAYERS * EXPERTS
        assert len(resident) == 12
