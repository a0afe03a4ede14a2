"""Who may come in: certificates, tokens and secrets at the client port and on links, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import random
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.api.client import Client
from cluster.api.router import Router
from cluster.config import EMBEDDED_MODEL, client_security, load_config
from cluster.core import Deadline
from cluster.errors import ConfigError, LinkBroken, LinkRefused, Unavailable
from cluster.experts.group import ExpertGroup
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.rpc.v1 import inference_pb2_grpc, links_pb2
from cluster.settings import ClientSecurity, SecurityConfig
from cluster.transport.grpc_link import GrpcTransport
from tests.door import Door
from tests.pki import Pki
from tests.systems import in_process_router, linked_router

HOST = "127.0.0.1"


def request(new: int = 6) -> pb.GenerateRequest:
    ids = pb.TokenIds(ids=[random.randrange(3, 500) for _ in range(5)])
    return pb.GenerateRequest(prompt_ids=ids, max_new_tokens=new, ignore_eos=True)


def tokens_of(client: Client, message: pb.GenerateRequest) -> list[int]:
    return [token.id for chunk in client.generate(message) for token in chunk.tokens]


def impatient(address: str, security: ClientSecurity) -> Client:
    return Client(address, timeout_s=10, resume_s=0, security=security)


@pytest.fixture(scope="module")
def router() -> Iterator[Router]:
    with in_process_router(EMBEDDED_MODEL) as made:
        yield made


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"), "mesh")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"), "others")


# -- links -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encrypted(mesh: Pki) -> Iterator[tuple[Router, list[ExpertGroup]]]:
    cert, key = mesh.issue(HOST)
    with linked_router(EMBEDDED_MODEL, "grpc", 2, security={"cert": cert, "key": key, "ca": mesh.ca}) as made:
        yield made


def test_links_with_certificates_give_the_same_tokens(
    encrypted: tuple[Router, list[ExpertGroup]], router: Router
) -> None:
    doors = [Door(), Door()]
    for door, served in zip(doors, (router, encrypted[0]), strict=True):
        door.open(served)
    with Client(doors[0].address) as plain, Client(doors[1].address) as secure:
        for _ in range(3):
            message = request()
            assert tokens_of(secure, message) == tokens_of(plain, message)
        assert {group.transport for group in secure.status().groups} == {"grpc"}
    for door in doors:
        door.close()


def _hello(group: ExpertGroup, secret: str) -> links_pb2.Hello:
    info = group.info()
    return links_pb2.Hello(fingerprint=info.fingerprint, dtype=info.dtype, secret=secret, router="test")


def test_a_group_lets_only_its_own_cluster_in(
    encrypted: tuple[Router, list[ExpertGroup]], mesh: Pki, others: Pki
) -> None:
    group = encrypted[1][0]
    address, soon = group.info().address, Deadline.after(5)
    own_cert, own_key = mesh.issue(HOST, file="peer")
    own = SecurityConfig(cert=own_cert, key=own_key, ca=mesh.ca)
    GrpcTransport(0, address, _hello(group, "test"), soon, security=own).close()
    foreign_cert, foreign_key = others.issue(HOST)
    with pytest.raises(LinkBroken):  # plain text on a TLS port
        GrpcTransport(0, address, _hello(group, "test"), Deadline.after(3))
    somebody_else = dataclasses.replace(own, cert=foreign_cert, key=foreign_key)
    distrustful = dataclasses.replace(own, ca=others.ca)
    for security in (somebody_else, distrustful):
        with pytest.raises(LinkBroken):
            GrpcTransport(0, address, _hello(group, "test"), Deadline.after(3), security=security)
    refused = group.info().refused_links
    with pytest.raises(LinkRefused, match="secret"):
        GrpcTransport(0, address, _hello(group, "another"), Deadline.after(5), security=own)
    assert group.info().refused_links == refused + 1
    with pytest.raises(LinkRefused, match="gloo"):  # not offered beside TLS
        GrpcTransport(0, address, _hello(group, "test"), Deadline.after(5), "gloo", security=own)


def test_names_in_certificates_may_stand_for_addresses(mesh: Pki) -> None:
    cert, key = mesh.issue("group.mesh.test", file="named")
    security = {"cert": cert, "key": key, "ca": mesh.ca, "peer_name": "group.mesh.test"}
    with linked_router(EMBEDDED_MODEL, "grpc", 1, security=security) as (made, _):
        assert made.status().groups[0].healthy


def test_what_does_not_go_together_is_refused_at_start(mesh: Pki) -> None:
    cert, key = mesh.issue(HOST)
    tls = {"cert": cert, "key": key, "ca": mesh.ca}
    wrong: list[tuple[dict[str, object], str]] = [
        ({"security": {"cert": cert}}, "security.cert"),
        ({"security": {"cert": cert, "key": key}}, "security.ca"),
        ({"security": {"client_ca": mesh.ca}}, "security.client_ca"),
        ({"security": tls, "front_door": "serve"}, "front_door"),
        ({"security": {"tokens": "tokens.yaml"}, "front_door": "serve"}, "front_door"),
        ({"security": {"tokens": "tokens.yaml"}, "listen": "0.0.0.0:9000"}, "security.cert"),
        ({"security": tls, "data_plane": {"transport": "gloo"}}, "data_plane.transport.*--trust-network"),
    ]
    for flags, message in wrong:
        with pytest.raises(ConfigError, match=message):
            load_config(flags=flags, environ={})
    load_config(flags={"security": {**tls, "trust_network": True}, "data_plane": {"transport": "gloo"}}, environ={})


def test_a_token_is_not_sent_in_plain_text_over_a_network() -> None:
    with pytest.raises(ConfigError, match="EXPERTMESH_CLIENT_CA"):
        Client("10.0.0.1:9000", security=ClientSecurity(token="emt_x"))
    for security in (ClientSecurity(token="emt_x", trust_network=True), ClientSecurity()):
        with Client("10.0.0.1:9000", security=security):
            pass


def test_secrets_are_not_shown() -> None:
    config = load_config(flags={"data_plane": {"secret": "sesame-1"}}, environ={})
    own = client_security({"EXPERTMESH_CLIENT_TOKEN": "sesame-2"})
    assert "sesame" not in repr(config) + str(config) + repr(own)


# -- the client port: TLS ----------------------------------------------------------------------------------------------


def test_the_client_port_with_tls(router: Router, mesh: Pki, others: Pki) -> None:
    cert, key = mesh.issue(HOST)
    door = Door(SecurityConfig(cert=cert, key=key))
    door.open(router)
    with impatient(door.address, ClientSecurity(ca=mesh.ca)) as client:
        assert len(tokens_of(client, request())) == 6
        assert client.status().security.tls
    with impatient(door.address, ClientSecurity()) as client, pytest.raises(Unavailable):
        client.status()
    with impatient(door.address, ClientSecurity(ca=others.ca)) as client, pytest.raises(Unavailable):
        client.status()
    door.close()


def test_clients_must_show_certificates(router: Router, mesh: Pki, others: Pki) -> None:
    cert, key = mesh.issue(HOST)
    door = Door(SecurityConfig(cert=cert, key=key, client_ca=others.ca))
    door.open(router)
    good_cert, good_key = others.issue("alice@example.test", file="alice")
    wrong_cert, wrong_key = mesh.issue("mallory@example.test", file="mallory")
    with impatient(door.address, ClientSecurity(ca=mesh.ca, cert=good_cert, key=good_key)) as client:
        assert len(tokens_of(client, request())) == 6
        assert client.status().security.client_certificates
    for security in (ClientSecurity(ca=mesh.ca), ClientSecurity(ca=mesh.ca, cert=wrong_cert, key=wrong_key)):
        with impatient(door.address, security) as client, pytest.raises(Unavailable):
            client.status()
    door.close()


def _shown(address: str) -> str:
    host, port = address.split(":")
    return ssl.get_server_certificate((host, int(port)))


def test_new_certificates_need_no_restart(router: Router, tmp_path: Path) -> None:
    pki = Pki(tmp_path, "mesh")
    cert, key = pki.issue(HOST)
    door = Door(SecurityConfig(cert=cert, key=key))
    door.open(router)
    with impatient(door.address, ClientSecurity(ca=pki.ca)) as before:
        before.status()
        old = _shown(door.address)
        pki.issue(HOST)
        new = _shown(door.address)
        assert new != old
        assert new == Path(cert).read_text().split("-----END")[0] + "-----END CERTIFICATE-----\n"
        # A key that is not the certificate's is not taken, and nobody is turned away by it.
        Path(key).write_bytes(Path(pki.issue(HOST, file="other")[1]).read_bytes())
        assert _shown(door.address) == new
        assert before.status().security.certificate_failures == 1
        assert before.status().security.certificate_reloads == 1
        with impatient(door.address, ClientSecurity(ca=pki.ca)) as client:
            assert client.status().state == "serving"
    door.close()


# -- abuse -------------------------------------------------------------------------------------------------------------


def test_garbage_and_giants_are_refused_and_others_are_served(router: Router) -> None:
    door = Door(SecurityConfig(max_connections=400, handshake_s=1.0))
    door.open(router)
    rng = random.Random()
    before = router.engine.stats().finished
    idle: list[socket.socket] = []

    def honest() -> float:
        started_s = time.monotonic()
        with impatient(door.address, ClientSecurity()) as client:
            assert len(tokens_of(client, request())) == 6
        return time.monotonic() - started_s

    try:
        with ThreadPoolExecutor(1) as pool:
            served = pool.submit(lambda: [honest() for _ in range(6)])
            host, port = door.address.split(":")
            for number in range(200):
                peer = socket.create_connection((host, int(port)), timeout=5)
                if number % 2:
                    with suppress(OSError):  # closed already
                        peer.sendall(rng.randbytes(rng.randrange(1, 4096)))
                idle.append(peer)
            with grpc.insecure_channel(door.address, options=(("grpc.max_send_message_length", -1),)) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                with pytest.raises(grpc.RpcError) as error:
                    stub.Tokenize(pb.TokenizeRequest(text="x" * (64 * 1024**2)), timeout=30)
                assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
                with pytest.raises(grpc.RpcError):
                    stub.Tokenize(pb.TokenizeRequest(text="x"), timeout=30, metadata=(("x-big", "y" * 100_000),))
            assert len(served.result(60)) == 6
        assert router.engine.stats().finished == before + 6
        # Whoever says nothing is sent away.
        limit = time.monotonic() + 20
        for peer in idle:
            peer.settimeout(max(0.1, limit - time.monotonic()))
            with suppress(ConnectionError):
                while peer.recv(65536):
                    pass
    finally:
        for peer in idle:
            peer.close()
        door.close()


def test_connections_are_bounded(router: Router) -> None:
    door = Door(SecurityConfig(max_connections=20))
    door.open(router)
    channels = []
    try:
        for number in range(40):  # each a connection of its own
            options = (("grpc.use_local_subchannel_pool", 1), ("test.number", number))
            channels.append(grpc.insecure_channel(door.address, options=options))
        for number, channel in enumerate(channels):
            check = health_pb2_grpc.HealthStub(channel).Check
            if number < 20:
                check(health_pb2.HealthCheckRequest(), timeout=10)
                continue
            with pytest.raises(grpc.RpcError) as error:
                check(health_pb2.HealthCheckRequest(), timeout=0.3)
            assert error.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        for channel in channels[10:]:
            channel.close()
        with Client(door.address, timeout_s=30, security=ClientSecurity()) as client:
            limit = time.monotonic() + 20
            while True:  # the server has to notice that there is room
                try:
                    client.status()
                    break
                except Unavailable:
                    assert time.monotonic() < limit
                    time.sleep(0.1)
    finally:
        for channel in channels:
            channel.close()
        door.close()
