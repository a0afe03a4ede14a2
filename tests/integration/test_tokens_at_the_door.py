"""Tokens at the client port: who comes in, what each may do, and files that change."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.api.client import Client
from cluster.api.router import Router
from cluster.api.tokens import digest, new_token
from cluster.config import EMBEDDED_MODEL
from cluster.errors import Forbidden, Overloaded, Unauthenticated
from cluster.rpc.v1 import control_pb2, control_pb2_grpc
from cluster.settings import ClientSecurity, SecurityConfig
from tests.door import Door
from tests.integration.test_security import impatient, request, tokens_of
from tests.systems import in_process_router


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    with in_process_router(EMBEDDED_MODEL) as made:
        yield made


class Guarded:
    """A door with a file of tokens."""

    def __init__(self, router: Router, folder: Path) -> None:
        self.file = folder / "tokens.yaml"
        self.tokens = {name: new_token() for name in ("alice", "late", "slow", "single", "root")}
        self.write(
            late="expires: 2020-01-01", slow="requests_per_minute: 3", single="concurrent: 1", root="control: true"
        )
        self.door = Door(SecurityConfig(tokens=str(self.file)))
        self.door.open(router)

    def write(self, without: str = "", **more: str) -> None:
        lines = ["tokens:"]
        for name, token in self.tokens.items():
            if name != without:
                extra = [f"  {more[name]}"] if name in more else []
                lines += [f"- name: {name}", f"  sha256: {digest(token)}", *extra]
        scratch = self.file.with_suffix(".new")
        scratch.write_text("\n".join(lines))
        scratch.replace(self.file)

    def client(self, name: str) -> Client:
        return impatient(self.door.address, ClientSecurity(token=self.tokens.get(name, name)))


@pytest.fixture
def guarded(router: Router, tmp_path: Path) -> Iterator[Guarded]:
    made = Guarded(router, tmp_path)
    yield made
    made.door.close()


def test_who_has_a_good_token_comes_in(guarded: Guarded) -> None:
    with guarded.client("alice") as client:
        assert len(tokens_of(client, request())) == 6
    for name, message in (("", "a token is needed"), ("emt_guess", "nobody has"), ("late", "expired on 2020-01-02")):
        with guarded.client(name) as client:
            with pytest.raises(Unauthenticated, match=message):
                client.status()
            with pytest.raises(Unauthenticated, match=message):
                tokens_of(client, request())
    with guarded.client("alice") as client:
        with pytest.raises(Forbidden, match="alice"):
            client.set_fail_over(True)
        refused = dict(client.status().security.refused)
    assert refused == {"UNAUTHENTICATED": 6, "PERMISSION_DENIED": 1}
    with guarded.client("root") as client:
        assert client.set_fail_over(True) in (True, False)
    with grpc.insecure_channel(guarded.door.address) as channel:  # probes have no token
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            control_pb2_grpc.ControlStub(channel).Status(
                control_pb2.StatusRequest(), timeout=10, metadata=(("authorization", "Basic YTpi"),)
            )
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_strangers_are_refused_before_they_have_said_anything(guarded: Guarded) -> None:
    """What they would send is not even received: the refusal comes while they still hold it back."""
    with grpc.insecure_channel(guarded.door.address) as channel:
        for path in (
            "/cluster.rpc.v1.Inference/Tokenize",
            "/cluster.rpc.v1.Inference/Generate",
            "/grpc.health.v1.Health/Watch",
        ):
            held = threading.Event()

            def nothing(held: threading.Event = held) -> Iterator[bytes]:
                held.wait(20)
                yield b""

            call = channel.stream_stream(path)(nothing(), timeout=15)
            with pytest.raises(grpc.RpcError) as error:
                next(call)
            held.set()
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_tokens_have_limits(guarded: Guarded) -> None:
    with guarded.client("slow") as client:
        for _ in range(3):
            client.model_info()
        with pytest.raises(Overloaded, match="3 requests a minute"):
            client.model_info()
    with guarded.client("single") as client:
        for _ in range(5):  # one after the other
            client.model_info()
        running = client.generate(request(400))
        next(running)
        with guarded.client("single") as second, pytest.raises(Overloaded, match="1 calls running"):
            second.model_info()
        running.close()  # type: ignore[attr-defined]
        limit = time.monotonic() + 10
        while True:  # the server has to hear of it
            try:
                client.model_info()
                break
            except Overloaded:
                assert time.monotonic() < limit
                time.sleep(0.02)


def test_tokens_come_and_go_without_a_restart(guarded: Guarded) -> None:
    with guarded.client("alice") as client:
        client.model_info()
        guarded.write(without="alice")
        time.sleep(1.1)
        with pytest.raises(Unauthenticated):
            client.model_info()
        guarded.write()
        time.sleep(1.1)
        client.model_info()
        guarded.file.write_text("tokens: [{name: alice, sha256: oops}]")
        time.sleep(1.1)
        client.model_info()  # those of before stay in use
        problem = client.status().security.tokens_problem
        assert "alice" in problem
        assert "oops" not in problem  # it may be a token that was put in the wrong place
