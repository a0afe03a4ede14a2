"""Rows written straight into the memory of links: the same calls as where they are divided first, whatever fails."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.core import Deadline, GroupInfo, LayerCall
from cluster.errors import ExpertMeshError, LinkBroken, MissingExperts
from cluster.kernels.rows import Owners, divide_into
from cluster.routing.choice import LayerCopies
from cluster.routing.step import StepContext
from cluster.transport.base import LayerReply, LayerRows, PendingReply
from tests.unit.test_dispatcher import FakeLink, World, batch, compute, wanted

JUNK = 7.0e8


class FakeRoom:
    """Memory with junk in it, which it gets again when it is left or its call was answered or cancelled."""

    def __init__(self, link: RoomyLink, call: LayerCall, tokens: int, hidden: int, pairs: int) -> None:
        self.link, self.call = link, call
        self.hidden_TH, self.pairs = torch.full((tokens, hidden), JUNK), np.full(3 * pairs, 99, np.int32)
        self.rows_at, self.pairs_at = self.hidden_TH.data_ptr(), int(self.pairs.ctypes.data)

    def rows(self, num_rows: int, num_pairs: int) -> LayerRows:
        return LayerRows(self.hidden_TH[:num_rows], self.pairs[: 3 * num_pairs].reshape(3, num_pairs))

    def spoil(self) -> None:
        self.hidden_TH.fill_(JUNK)
        self.pairs.fill(99)

    def leave(self) -> None:
        if self.link.rooms.pop(self.call.call_id, None) is not None:
            self.link.left += 1
            self.spoil()


class RoomyLink(FakeLink):
    kind = "shm"

    def __init__(self, group: int, world: World) -> None:
        super().__init__(group, world)
        self.rooms: dict[int, FakeRoom] = {}
        self.sent: dict[int, FakeRoom] = {}
        self.left = 0
        self.told: set[int] = set()

    def room(self, call: LayerCall, tokens: int, hidden: int, pairs: int) -> FakeRoom | None:  # type: ignore[override]
        if not self.healthy():
            return None
        self.told.add(call.call_id)
        room = self.rooms[call.call_id] = FakeRoom(self, call, tokens, hidden, pairs)
        return room

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        room = self.rooms.pop(call.call_id, None)
        assert (room is not None) == (call.call_id in placed_ids(self.world)), "with the call that it was told of"
        error = self.world.fail(self.group, call)
        if isinstance(error, LinkBroken):
            raise error
        self.world.calls.append((self.group, call, LayerRows(rows.hidden_TH.clone(), rows.pairs_3P.copy())))
        pending = PendingReply(self.group, call)
        if room is not None:
            self.sent[call.call_id] = room
        if error is not None:
            pending.fail(error)
            return pending
        delay = self.world.delays.get(self.group, 0.0)
        timer = threading.Timer(delay, lambda: self.answer(pending, rows))
        timer.daemon = True
        timer.start()
        return pending

    def answer(self, pending: PendingReply, rows: LayerRows) -> None:
        try:
            reply = LayerReply(compute(rows), 0.001, 0.002)
        except IndexError:  # junk: the call was cancelled meanwhile
            assert pending.call.call_id not in self.sent
            return
        pending.resolve(reply)

    def cancel(self, pending: PendingReply) -> None:
        super().cancel(pending)
        room = self.sent.pop(pending.call.call_id, None)
        if room is not None:
            room.spoil()


def placed_ids(world: World) -> set[int]:
    return {i for link in world.fabric._links.values() if isinstance(link, RoomyLink) for i in link.told}


class RoomyWorld(World):
    def connect(self, info: GroupInfo) -> FakeLink:
        if info.group in self.dead:
            raise LinkBroken("nobody there")
        return RoomyLink(info.group, self)

    def links(self) -> list[RoomyLink]:
        return [link for link in self.fabric._links.values() if isinstance(link, RoomyLink)]

    def connected(self) -> RoomyWorld:
        for group in self.infos:
            self.fabric.link(group)
        return self


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_calls_are_written_into_the_links_and_the_sum_is_right(num_groups: int, copies: int) -> None:
    world = RoomyWorld(num_groups, copies=min(copies, num_groups)).connected()
    dispatcher = world.dispatcher()
    for step in range(6):
        given = batch(random.randint(1, 9))
        world.calls.clear()
        assert torch.allclose(dispatcher(StepContext(step), 0, *given), wanted(*given), atol=1e-5)
        groups = [group for group, _, _ in world.calls]
        assert groups == sorted(set(groups)), "one layer call a group, in their order"
        assert {call.call_id for _, call, _ in world.calls} <= placed_ids(world), "no call was divided first"
        assert sum(rows.pair_expert_P.numel() for *_, rows in world.calls) == given[1].numel()
    assert not any(link.rooms for link in world.links()), "a room that nobody used was left"


def test_a_group_without_pairs_is_told_that_no_call_comes() -> None:
    world = RoomyWorld(3).connected()
    hidden_TH, index_TK, weight_TK = batch(2)
    held = world.infos[1].holdings[0]
    index_TK[:] = torch.tensor(held[: index_TK.shape[1]])
    got = world.dispatcher()(StepContext(1), 0, hidden_TH, index_TK, weight_TK)
    assert torch.allclose(got, wanted(hidden_TH, index_TK, weight_TK), atol=1e-5)
    assert [link.left for link in sorted(world.links(), key=lambda link: link.group)] == [1, 0, 1]


@pytest.mark.parametrize("error", [LinkBroken("gone"), MissingExperts(1, 0, [3])])
def test_rows_of_a_call_that_failed_are_kept_until_it_is_sent_again(error: ExpertMeshError) -> None:
    world, given = RoomyWorld(2, copies=2).connected(), batch(8)
    failures = [error]
    world.fail = lambda group, _call: failures.pop() if group == 1 and failures else None
    got = world.dispatcher()(StepContext(1), 0, *given)
    assert torch.allclose(got, wanted(*given), atol=1e-5)
    assert world.caller.resent_calls > 0


def test_rows_of_a_call_that_timed_out_are_sent_again_although_its_memory_is_anothers() -> None:
    world, given = RoomyWorld(2).connected(), batch(8)
    world.delays = {1: 30.0}

    def hasten(_group: int, call: LayerCall) -> None:
        if call.call_id not in placed_ids(world):
            world.delays = {}

    world.fail = hasten
    got = world.dispatcher(call_timeout_s=0.2, group_wait_s=0.1)(StepContext(1), 0, *given)
    assert torch.allclose(got, wanted(*given), atol=1e-5)
    assert world.caller.resent_calls == 1


def test_where_one_link_has_no_memory_all_are_divided_first() -> None:
    world, given = RoomyWorld(3).connected(), batch(6)
    full = world.links()[2]
    full.room = lambda *_: None  # type: ignore[method-assign, assignment]
    assert torch.allclose(world.dispatcher()(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
    assert not any(call.call_id in placed_ids(world) for _, call, _ in world.calls)
    assert not any(link.rooms for link in world.links())


def test_a_group_that_is_trusted_again_meanwhile_is_asked_in_the_next_layer() -> None:
    world, given = RoomyWorld(3, copies=2).connected(), batch(9)
    dispatcher = world.dispatcher()
    world.caller.speeds._cost = {0: 2.0, 1: 1.0, 2: 1.0}  # so that more is asked than who has fewer experts
    world.fabric.suspect(2, given[0])
    first = min(world.links(), key=lambda link: link.group)
    room = first.room

    def answers_again(call: LayerCall, *shape: int) -> FakeRoom | None:
        world.fabric._suspects.clear()
        world.fabric._copies = {}
        return room(call, *shape)

    first.room = answers_again  # type: ignore[method-assign, assignment]
    for asked in ({0, 1}, {0, 1, 2}):
        world.calls.clear()
        assert torch.allclose(dispatcher(StepContext(1), 0, *given), wanted(*given), atol=1e-5)
        assert {group for group, *_ in world.calls} == asked


@pytest.mark.parametrize("fails_at", [0, 1])
def test_no_room_is_kept_where_another_cannot_be_had(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world, given = RoomyWorld(2).connected(), batch(4)
    dispatcher = world.dispatcher()

    def broken(*_: object) -> None:
        raise ValueError("boom")

    monkeypatch.setattr(sorted(world.links(), key=lambda link: link.group)[fails_at], "room", broken)
    with pytest.raises(ValueError, match="boom"):
        dispatcher(StepContext(1), 0, *given)
    assert not any(link.rooms for link in world.links())


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_of_two_copies_the_same_is_chosen_as_by_the_plain_loop(data: st.DataObject) -> None:
    groups, experts, tokens = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 16)), data.draw(st.integers(1, 6))
    holders = st.lists(st.integers(0, groups - 1), min_size=1, max_size=2, unique=True)
    copies = LayerCopies([data.draw(holders) for _ in range(experts)])
    each = data.draw(st.integers(1, experts))
    index_TK = torch.stack([torch.randperm(experts)[:each] for _ in range(tokens)])
    experts_P, rows_P = index_TK.reshape(-1).numpy(), np.repeat(np.arange(tokens), each)
    owner_E = copies.choose(experts_P, True, {})
    assert copies.second_E is not None
    hidden_TH, weight_TK = torch.randn(tokens, 3), torch.rand(tokens, each)
    memory = [
        (torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, 3), np.zeros(3 * tokens * each, np.int32))
        for _ in range(groups + 1)
    ]
    where = [at for index, rows, named in memory for at in (index.data_ptr(), rows.data_ptr(), named.ctypes.data)]
    pairs_at = rows_P.ctypes.data, index_TK.data_ptr(), weight_TK.data_ptr()
    shares = divide_into(Owners(copies.owner_E, copies.second_E), hidden_TH, pairs_at, len(rows_P), where)
    for group in range(groups):
        pairs, rows, names = shares[group + 1]
        mine = experts_P[owner_E[experts_P] == group]
        assert (pairs, names) == (len(mine), len(set(mine.tolist())))
        assert rows == len({int(row) for row, e in zip(rows_P, experts_P, strict=True) if owner_E[e] == group})
        assert memory[group + 1][2][pairs : 2 * pairs].tolist() == mine.tolist()
    assert shares[0] == (0, 0, 0)


def test_a_group_that_has_no_place_is_an_error_and_nothing_is_written_anywhere() -> None:
    owner_E, index_TK, hidden_TH = np.array([0, 1]), torch.tensor([[1]]), torch.randn(1, 3)
    rows_P, weight_TK = np.zeros(1, np.int64), torch.ones(1, 1)
    pairs_at = rows_P.ctypes.data, index_TK.data_ptr(), weight_TK.data_ptr()
    with pytest.raises(IndexError, match="pairs"):
        divide_into(Owners(owner_E, None), hidden_TH, pairs_at, 1, [0] * 9)
