"""Calls that a group computes where it reads them: the same as through Python, and only those that may be."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from cluster.core import Deadline, LayerCall, Priority
from cluster.errors import ExpertMeshError, InternalError, LinkBroken, MissingExperts, Unavailable
from cluster.experts import group as groups
from cluster.experts.host import ExpertHost
from cluster.experts.identity import Identity
from cluster.experts.shm_server import ShmServer
from cluster.kernels import door
from cluster.kernels.door import can_listen
from cluster.kernels.experts import GatedExperts, Scratch, Weights
from cluster.kernels.served import ServedLayers
from cluster.rpc.v1 import links_pb2
from cluster.transport.base import LayerReply, LayerRows, PendingReply
from cluster.transport.codec import PROTOCOL_VERSION, Placement, encode_form, encode_ids
from cluster.transport.handshake import encode_hello
from cluster.transport.mapped import SEALS
from cluster.transport.replies import reply_header
from cluster.transport.shm import ShmTransport
from tests.conftest import MakeTiny
from tests.systems import config_for, experts_per_layer
from tests.unit.test_bank import bank, table
from tests.unit.test_gated_experts import module

pytestmark = pytest.mark.skipif(not can_listen(), reason="no compiler")
SOON = 10.0
HIDDEN, INNER, EXPERTS, MOST = 32, 48, 6, 8
MARK = 1000.0
"""What `Group.compute` adds, so that one knows who computed."""


def experts() -> GatedExperts:
    up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    made = GatedExperts.of(module(), Weights(up), Weights(down))
    assert made is not None
    return made


class Group:
    """One with two layers that are served, of which it lacks one expert each, and a third that is not."""

    def __init__(self, compute: Any = None, served: ServedLayers | None = None) -> None:
        self.layers = [experts(), experts()]
        self.slot_of_E = np.arange(-1, EXPERTS - 1, dtype=np.int64)
        own = [layer.served(self.slot_of_E, MOST) for layer in self.layers]
        self.served = served or ServedLayers([*own, None])
        self.computed: list[LayerRows] = []
        self.host = ExpertHost(compute or self.compute, threads=1, served=self.served)
        self.server = ShmServer(Identity(0, "i", "f", "fp32", "s"), self.host)
        hello = links_pb2.Hello(fingerprint="f", dtype="fp32", secret="s")
        self.link = ShmTransport(0, self.server.address, hello, Deadline.after(SOON))
        self._ids = itertools.count(1 + (random.getrandbits(40) << 20))

    def wanted(self, layer: int, rows: LayerRows) -> torch.Tensor:
        total = self.layers[layer].run(rows.hidden_TH, rows.pairs_3P, self.slot_of_E, Scratch())
        assert total is not None
        return total

    def compute(self, layer: int, rows: LayerRows) -> torch.Tensor:
        self.computed.append(rows)
        if not (self.slot_of_E[rows.pairs_3P[1]] >= 0).all():
            raise InternalError("missing")
        return self.wanted(layer % 2, rows) + MARK

    def call(self, layer: int, rows: LayerRows, priority: Priority = Priority.DECODE, trace: str = "") -> LayerReply:
        call = LayerCall(next(self._ids), 1, layer, 1, 1, priority, 0, trace)
        deadline = Deadline.after(SOON)
        return self.link.submit(call, rows, deadline).wait(deadline)

    def close(self) -> None:
        self.link.close()
        self.server.close()
        self.host.close()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.close()


def some(tokens: int, each: int = 2, of: Sequence[int] = range(1, EXPERTS), width: int = HIDDEN) -> LayerRows:
    pairs = [(row, expert) for row in range(tokens) for expert in random.sample(of, each)]
    weights = np.random.rand(len(pairs))
    return LayerRows.of(torch.randn(tokens, width), [row for row, _ in pairs], [e for _, e in pairs], weights)


def test_what_is_served_is_what_python_computes(group: Group) -> None:
    for number in range(40):
        layer, rows = number % 2, some(random.randint(1, MOST), random.randint(1, EXPERTS - 1))
        rows = LayerRows(rows.hidden_TH * 10 ** random.uniform(-3, 3), rows.pairs_3P)
        reply = group.call(layer, rows, random.choice([Priority.DECODE, Priority.RESENT]))
        assert torch.equal(reply.partial_TH, group.wanted(layer, rows))
        assert 0 < reply.compute_s < SOON
        assert (reply.queue_s, reply.load_s, reply.load_bytes, reply.load_expert) == (0, 0, 0, -1)
    assert not group.computed
    assert group.host.calls == 40
    assert 0 < group.host.busy_s < SOON
    assert group.host.progress_age_s() == 0


def test_rows_without_pairs_are_nothing(group: Group) -> None:
    rows = some(4)
    rows.pairs_3P[0] = 2  # all of them
    reply = group.call(0, rows)
    assert torch.equal(reply.partial_TH, group.wanted(0, rows))
    assert not reply.partial_TH[[0, 1, 3]].any()


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_rounded_weights_are_served_too(weights: str, group: Group) -> None:
    up, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    if weights == "bf16":
        made = GatedExperts.of(module(), Weights(up.bfloat16()), Weights(down.bfloat16()))
    else:
        parts = [Weights((w * 30).clamp(-127, 127).to(torch.int8), torch.rand(w.shape[:2]) + 0.1) for w in (up, down)]
        made = GatedExperts.of(module(), *parts)
    assert made is not None
    group.layers[0] = made
    group.host.between_calls(lambda: group.served.put(0, made.served(group.slot_of_E, MOST)))
    rows = some(3)
    assert torch.equal(group.call(0, rows).partial_TH, group.wanted(0, rows))
    assert not group.computed


def refused() -> dict[str, tuple[int, LayerRows, Priority, str]]:
    decode, trace = Priority.DECODE, "00-" + "1" * 32 + "-" + "2" * 16 + "-01"
    halves = some(2)
    return {
        "prefill": (0, some(2), Priority.PREFILL, ""),
        "traced": (0, some(2), decode, trace),
        "more rows than the layer takes": (0, some(MOST + 1), decode, ""),
        "a layer that is not served": (2, some(2), decode, ""),
        "a layer that is none": (7, some(2), decode, ""),
        "half precision": (0, LayerRows(halves.hidden_TH.bfloat16(), halves.pairs_3P), decode, ""),
    }


@pytest.mark.parametrize("why", [*refused()])
def test_anything_else_goes_through_python(why: str, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows, priority, trace = refused()[why]
    monkeypatch.setattr(group, "compute", None)  # what the host has stays
    if why == "half precision":
        group.host._compute = lambda _layer, rows: rows.hidden_TH.float()
        got = group.call(layer, rows, priority, trace)
        assert torch.equal(got.partial_TH, rows.hidden_TH.float())
        return
    got = group.call(layer, rows, priority, trace)
    assert torch.equal(got.partial_TH, group.wanted(layer % 2, rows) + MARK)
    assert len(group.computed) == 1
    rows = some(1)
    assert torch.equal(group.call(0, rows).partial_TH, group.wanted(0, rows))


@pytest.mark.parametrize("bad", [0, EXPERTS, 2**31 - 1, -1])
def test_an_expert_that_is_not_there_is_pythons_to_refuse(bad: int, group: Group) -> None:
    rows = some(2)
    rows.pairs_3P[1, 1] = bad
    with pytest.raises(ExpertMeshError):
        group.call(0, rows)
    rows = some(2)
    assert torch.equal(group.call(0, rows).partial_TH, group.wanted(0, rows))


@pytest.mark.parametrize("row", [-1, 2, 2**31 - 1])
def test_a_row_that_is_not_there_computes_nothing(row: int, group: Group) -> None:
    rows = some(2)
    rows.pairs_3P[0, 0] = row
    group.host._compute = lambda _layer, rows: torch.full(rows.hidden_TH.shape, MARK)
    assert (group.call(0, rows).partial_TH == MARK).all()


def test_offsets_outside_the_memory_are_refused_and_the_link_goes_on(group: Group) -> None:
    size = group.link._memory.capacity
    places = [(0, 4096, 2**63), (2**62, 0, 0), (0, 2**64 - 64, 0), (size * 8, 0, 0), (2, 4096, 8192)]
    for rows_at, pairs_at, reply_at in places:
        form = encode_form(torch.float32, (2, HIDDEN), Placement.SHARED, rows_at, pairs_at, reply_at)
        group.link._socket.send(form + encode_ids(LayerCall(1, 1, 0, 1, 1), 4))
    for shape in ((2**31, 2**31), (2**16, 2**16 + 1), (0, HIDDEN), (2, 0)):
        form = bytearray(encode_form(torch.float32, (2, HIDDEN), Placement.SHARED, 0, 4096, 8192))
        form[4:12] = np.array(shape, "<u4").tobytes()
        group.link._socket.send(bytes(form) + encode_ids(LayerCall(1, 1, 0, 1, 1), 4))
    rows = some(2)
    got, wanted = group.call(0, rows).partial_TH, group.wanted(0, rows)
    assert torch.equal(got, wanted) or torch.equal(got, wanted + MARK), "it may have waited behind those"
    assert torch.equal(group.call(0, rows).partial_TH, wanted)


def test_a_layer_that_changes_is_another_from_the_next_call_on(group: Group) -> None:
    stop, wrong = threading.Event(), []

    def change() -> None:
        while not stop.is_set():
            fresh = experts()

            def swap(fresh: GatedExperts = fresh) -> None:
                group.layers[0] = fresh
                group.served.put(0, fresh.served(group.slot_of_E, MOST))

            group.host.between_calls(swap)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        ends_s = time.monotonic() + 1.0
        while time.monotonic() < ends_s:
            before, rows = group.layers[0], some(3)
            got = group.call(0, rows).partial_TH
            after = group.layers[0]
            possible = [
                layer.run(rows.hidden_TH, rows.pairs_3P, group.slot_of_E, Scratch()) for layer in (before, after)
            ]
            if before is after:
                wrong.append(not torch.equal(got, possible[0]))
    finally:
        stop.set()
        changer.join()
    assert wrong, "some calls were not disturbed"
    assert not any(wrong)


def test_changes_that_fail_or_come_too_late_say_so(group: Group) -> None:
    def fails() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        group.host.between_calls(fails)
    rows = some(2)
    assert torch.equal(group.call(1, rows).partial_TH, group.wanted(1, rows))
    group.host.close()
    with pytest.raises(Unavailable):
        group.host.between_calls(lambda: None)


@contextlib.contextmanager
def calling(group: Group) -> Iterator[None]:
    """Calls keep coming meanwhile."""
    stop = threading.Event()

    def calls() -> None:
        while not stop.is_set():
            group.call(0, some(2))

    caller = threading.Thread(target=calls)
    caller.start()
    try:
        yield
    finally:
        stop.set()
        caller.join()


def test_a_change_is_made_while_calls_keep_coming(group: Group) -> None:
    with calling(group):
        for _ in range(20):
            group.host.between_calls(lambda: None)


def test_calls_that_are_served_keep_neither_others_waiting_nor_the_thread_from_saying_that_it_goes_on(
    group: Group,
) -> None:
    with calling(group):
        time.sleep(2.5)
        pending = PendingReply(0, LayerCall(1, 1, 0, 1, 1))
        group.host.submit(pending.call, some(1), pending, lend=lambda: None)  # whom nobody takes
        age_s = group.host.progress_age_s()
        pending.wait(Deadline.after(SOON))
    assert age_s < 2.0


def test_who_leaves_before_the_welcome_leaves_nothing_behind(group: Group) -> None:
    for _ in range(40):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as early:
            early.connect(b"\0" + group.server.address.encode())
            memory = os.memfd_create("early", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(memory, 1 << 20)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, SEALS)
            hello = links_pb2.Hello(fingerprint="f", dtype="fp32", secret="s")
            hello.protocol, hello.memory_bytes = PROTOCOL_VERSION, 1 << 20
            socket.send_fds(early, [encode_hello(hello)], [memory])
            os.close(memory)
    ends_s = time.monotonic() + SOON
    while group.server.num_links() != 1 and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert group.server.num_links() == 1
    hello = links_pb2.Hello(fingerprint="f", dtype="fp32", secret="s")
    others: list[ShmTransport] = []
    while len(others) < 5 and time.monotonic() < ends_s:
        with contextlib.suppress(LinkBroken):  # the socket's backlog is full of those for a while
            others.append(ShmTransport(0, group.server.address, hello, Deadline.after(SOON)))
    while group.server.num_links() != 1 + len(others) and time.monotonic() < ends_s:
        time.sleep(0.01)
    assert group.server.num_links() == 6
    for link in (group.link, *others):
        group.link, rows = link, some(3)
        assert torch.equal(group.call(1, rows).partial_TH, group.wanted(1, rows))
    for link in others:
        link.close()
    assert not group.computed


WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"table": table(256), "threads": 1},
    "up to 4 rows": {"table": table(4), "threads": 1},
    "int8": {"expert_dtype": "int8", "threads": 1},
    "bf16": {"expert_dtype": "bf16", "threads": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_bank_serves_what_it_computes_before_and_after_it_has_changed(way: str, tiny: MakeTiny) -> None:
    path = tiny("qwen3_moe")
    ours = bank(path, [[0, 2] for _ in experts_per_layer(path)], **WAYS[way])
    served = ours.served()
    assert served is not None
    group = Group(ours.compute, served)
    ours.change_with(group.host.between_calls)
    try:
        for holds in ([0, 2], [1, 2, 3], [3]):
            ours.hold(0, holds)
            before = group.host.sockets.served[0]
            for tokens in (1, 2, 4):
                rows = some(tokens, len(holds), holds, 64)
                wanted = ours.compute(0, rows)
                assert torch.equal(group.call(0, rows).partial_TH, wanted)
            assert group.host.sockets.served[0] == before + 3
            many = some(8, len(holds), holds, 64)
            assert torch.equal(group.call(0, many).partial_TH, ours.compute(0, many))
            assert group.host.sockets.served[0] == before + (3 if way == "up to 4 rows" else 4)
        with pytest.raises(MissingExperts):
            group.call(0, some(1, 1, [0], 64))
    finally:
        group.close()
        ours.close()


def test_experts_with_biases_or_without_tiles_or_on_demand_are_not_served(tiny: MakeTiny) -> None:
    biased, plain = bank(tiny("gpt_oss"), **WAYS["fp32"]), bank(tiny("qwen3_moe"))
    for ours in (biased, plain):
        served = ours.served()
        assert served is not None
        assert not any(served._kept)
    stored = bank(tiny("qwen3_moe"), memory_bytes=plain.num_bytes // 2, **WAYS["fp32"])
    assert stored.served() is None
    for each in (biased, plain, stored):
        each.close()


@pytest.mark.parametrize(("threads", "faults"), [(1, {}), (2, {}), (1, {"group": 0, "compute_ms": 1})])
def test_a_group_serves_with_one_thread_and_no_planted_fault(
    threads: int, faults: dict[str, int], tiny: MakeTiny
) -> None:
    path = tiny("qwen3_moe")
    held = [[0, 1] for _ in experts_per_layer(path)]
    made = groups.ExpertGroup(0, held, config_for(path, faults=faults), threads)
    try:
        assert isinstance(made.host, ExpertHost)
        assert (made.host.served is not None) == (threads == 1 and not faults)
        assert (made.bank._change is not None) == (made.host.served is not None)
    finally:
        made.close()


def test_packets_are_laid_out_as_the_door_reads_them() -> None:
    call = LayerCall(2**63 + 5, 7, 3, 4, 5, Priority.DECODE, 6, "t" * 55)
    packet = encode_form(torch.float32, (11, 13), Placement.SHARED, 64, 128, 192) + encode_ids(call, 17)

    def number(at: int, dtype: str) -> int:
        return int(np.frombuffer(packet, dtype, 1, at)[0])

    assert len(packet) == door.CALL_BYTES
    assert number(door.CALL_FIRST, "<u4") == door.SERVED_WORD
    assert [number(at, "<u4") for at in (door.CALL_TOKENS, door.CALL_WIDTH)] == [11, 13]
    assert [number(at, "<u8") for at in (door.CALL_ROWS, door.CALL_PAIRS, door.CALL_REPLY)] == [64, 128, 192]
    assert [number(at, "<u4") for at in (door.CALL_NUM_PAIRS, door.CALL_LAYER, door.CALL_PRIORITY)] == [17, 3, 1]
    assert number(door.CALL_ID, "<u8") == 2**63 + 5
    assert packet[door.CALL_TRACE] == ord("t")
    assert int(Priority.PREFILL) == door.URGENT
    reply = reply_header(2**63 + 5, LayerReply(torch.empty(11, 13), 0.5, 0.25), Placement.SHARED, 8.0)
    assert np.frombuffer(reply, "<u4", 2, door.ANSWER_SHAPE).tolist() == [11, 13]
    assert np.frombuffer(reply, "<u8", 1, door.ANSWER_ID)[0] == 2**63 + 5
    assert [np.frombuffer(reply, "<f8", 1, at)[0] for at in (door.ANSWER_COMPUTE, door.ANSWER_DONE)] == [0.25, 8.0]
