"""The gRPC transport against a real data-plane server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import torch

from cluster.core import Deadline, LayerCall
from cluster.errors import DeadlineExceeded, InternalError, LinkBroken, LinkRefused, MissingExperts
from cluster.experts.host import ExpertHost
from cluster.experts.server import DataPlaneServer, Identity
from cluster.rpc.v1 import experts_pb2, experts_pb2_grpc
from cluster.transport.base import LayerRows
from cluster.transport.grpc_link import GrpcTransport

SOON = 15.0


class Compute:
    """Adds one; layer 1 waits for `open`, layer 2 lacks experts, layer 3 fails."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self, layer: int, rows: LayerRows) -> torch.Tensor:
        if layer == 1:
            self.entered.set()
            assert self.open.wait(SOON)
        if layer == 2:
            raise MissingExperts(4, layer, [7])
        if layer == 3:
            raise ValueError("boom")
        return rows.hidden_TH.float() + 1


@pytest.fixture
def compute() -> Compute:
    return Compute()


@pytest.fixture
def server(compute: Compute) -> Iterator[DataPlaneServer]:
    host = ExpertHost(compute)
    server = DataPlaneServer(Identity(4, "born", "model", "fp32", "secret"), host, "127.0.0.1", "127.0.0.1")
    yield server
    compute.open.set()
    server.close(0)
    host.close()


def hello(**fields: object) -> experts_pb2.Hello:
    return experts_pb2.Hello(**{"fingerprint": "model", "dtype": "fp32", "secret": "secret", **fields})  # type: ignore[arg-type]


@pytest.fixture
def link(server: DataPlaneServer) -> Iterator[GrpcTransport]:
    link = GrpcTransport(4, server.address, hello(), Deadline.after(SOON))
    yield link
    link.close()


def rows(tokens: int, hidden: int = 8, dtype: torch.dtype = torch.float32) -> LayerRows:
    count = torch.arange(tokens, dtype=torch.int32)
    return LayerRows(torch.randn(tokens, hidden).to(dtype), count, count, torch.ones(tokens))


def call(number: int, layer: int = 0) -> LayerCall:
    return LayerCall(number, 1, layer, 1, 1)


@pytest.mark.parametrize("tokens", [0, 1, 7, 512, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_bit_by_bit(link: GrpcTransport, tokens: int, dtype: torch.dtype) -> None:
    sent = rows(tokens, 64, dtype)
    reply = link.submit(call(1), sent, Deadline.after(SOON)).wait(Deadline.after(SOON))
    assert torch.equal(reply.partial_TH, sent.hidden_TH.float() + 1)
    assert reply.compute_s >= 0


def test_many_calls_are_in_flight_and_matched_by_id(link: GrpcTransport) -> None:
    def one(number: int) -> bool:
        sent = rows(number % 9 + 1)
        reply = link.submit(call(number), sent, Deadline.after(SOON)).wait(Deadline.after(SOON))
        return torch.equal(reply.partial_TH, sent.hidden_TH + 1)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(1, 300)))


def test_errors_of_the_group_arrive_typed(link: GrpcTransport) -> None:
    with pytest.raises(MissingExperts, match=r"\[7\]"):
        link.submit(call(1, layer=2), rows(1), Deadline.after(SOON)).wait(Deadline.after(SOON))
    with pytest.raises(InternalError, match="ValueError"):
        link.submit(call(2, layer=3), rows(1), Deadline.after(SOON)).wait(Deadline.after(SOON))


def test_a_call_without_answer_ends_at_its_deadline_and_can_be_cancelled(link: GrpcTransport, compute: Compute) -> None:
    stuck = link.submit(call(1, layer=1), rows(1), Deadline.after(SOON))
    assert compute.entered.wait(SOON)
    queued = link.submit(call(2), rows(1), Deadline.after(SOON))
    with pytest.raises(DeadlineExceeded):
        queued.wait(Deadline.after(0.05))
    link.cancel(queued)
    compute.open.set()
    assert stuck.wait(Deadline.after(SOON))
    assert link.submit(call(3), rows(1), Deadline.after(SOON)).wait(Deadline.after(SOON))


def test_the_death_of_the_group_breaks_calls_in_flight_and_later_ones(
    link: GrpcTransport, server: DataPlaneServer, compute: Compute
) -> None:
    pending = link.submit(call(1, layer=1), rows(1), Deadline.after(SOON))
    assert compute.entered.wait(SOON)
    server.close(0)
    with pytest.raises(LinkBroken):
        pending.wait(Deadline.after(SOON))
    assert not link.healthy()
    with pytest.raises(LinkBroken):
        link.submit(call(2), rows(1), Deadline.after(SOON))


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"fingerprint": "other"}, "model other"),
        ({"dtype": "bf16"}, "dtype bf16"),
        ({"secret": "guess"}, "secret"),
        ({"secret": "ключ"}, "secret"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    server: DataPlaneServer, fields: dict[str, object], word: str
) -> None:
    with pytest.raises(LinkRefused, match=word):
        GrpcTransport(4, server.address, hello(**fields), Deadline.after(SOON))


def test_another_protocol_version_and_calls_without_handshake_are_refused(server: DataPlaneServer) -> None:
    for first in (
        experts_pb2.ToGroup(hello=hello(protocol=99)),
        experts_pb2.ToGroup(call=experts_pb2.LayerCallMessage(call_id=1)),
    ):
        with grpc.insecure_channel(server.address) as channel:
            stream = experts_pb2_grpc.ExpertsStub(channel).LayerCalls(iter([first]), timeout=SOON)
            with pytest.raises(grpc.RpcError) as caught:
                next(stream)
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_nobody_at_the_address_is_a_broken_link_within_the_deadline(server: DataPlaneServer) -> None:
    address = server.address
    server.close(0)
    started_s = time.monotonic()
    with pytest.raises(LinkBroken):
        GrpcTransport(4, address, hello(), Deadline.after(1.0))
    assert time.monotonic() - started_s < SOON


def test_a_corrupt_call_is_answered_and_the_link_goes_on(server: DataPlaneServer) -> None:
    first = hello(protocol=1)
    bad = experts_pb2.LayerCallMessage(call_id=5, num_tokens=2**31, hidden_size=2**31, dtype="fp32", hidden=b"x")
    messages = [experts_pb2.ToGroup(hello=first), experts_pb2.ToGroup(call=bad)]
    done = threading.Event()

    def requests() -> Iterator[experts_pb2.ToGroup]:
        yield from messages
        done.wait(SOON)

    with grpc.insecure_channel(server.address) as channel:
        stream = experts_pb2_grpc.ExpertsStub(channel).LayerCalls(requests(), timeout=SOON)
        assert next(stream).welcome.group == 4
        reply = next(stream).reply
        assert (reply.call_id, reply.status) == (5, experts_pb2.REPLY_STATUS_BAD_CALL)
        assert "hidden" in reply.error
        done.set()
