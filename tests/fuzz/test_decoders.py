"""Every decoder of bytes from the network, fed with what no good peer sends: each must answer or refuse with an error
of ours, soon, and without memory that grows. `make fuzz` takes ten minutes and more, `make test` a second for each."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.api.convert import ModelLimits, to_request
from cluster.api.gate import _bearer
from cluster.api.servicer import _tolerant, parsed
from cluster.api.tokens import parse_grants
from cluster.api.tracing import TraceContext
from cluster.core import LayerCall
from cluster.errors import ConfigError, ExpertMeshError
from cluster.experts.group import ExpertGroup
from cluster.experts.stream import RouterStream
from cluster.rpc.v1 import control_pb2, links_pb2
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.transport.base import LayerRows
from cluster.transport.codec import PROTOCOL_VERSION, decode_call, decode_call_id, decode_order, encode_call
from cluster.transport.handshake import decode_hello, decode_welcome, encode_hello
from cluster.transport.mapped import SEALS
from cluster.transport.replies import ReplyStatus, decode_reply_head, decode_times, raise_for_status, reply_rows
from cluster.weights.checkpoint import Checkpoint
from tests.conftest import MakeTiny
from tests.fuzz.frames import HELLOS, REPLIES, local_calls, mutated, to_group
from tests.systems import config_for, experts_per_layer

MOST_GROWN_BYTES = 400 * 1024**2
SLOWEST_S = 5.0
HIDDEN, EXPERTS, LAYERS = 64, 8, 4
LIMITS = ModelLimits(512, 256, "test", frozenset({1}), 16, 60.0, verify=True)

Fuzz = Callable[..., None]


@pytest.fixture
def fuzz(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Fuzz]:
    """``fuzz(target, strategy...)`` calls the target again and again until its time is over."""
    seconds = request.config.getoption("--fuzz-seconds")
    process = psutil.Process()
    before = process.memory_info().rss

    def run(target: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
        count = itertools.count()
        slowest = 0.0

        @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.tuples(*strategies))
        def once(values: tuple[Any, ...]) -> None:
            nonlocal slowest
            next(count)
            started_s = time.monotonic()
            target(*values)
            slowest = max(slowest, time.monotonic() - started_s)

        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            once()
        with capsys.disabled():
            if seconds > 5:
                print(f"\n{request.node.name}: {next(count)} inputs in {seconds:g} s, slowest {1e3 * slowest:.1f} ms")
        assert slowest < SLOWEST_S

    yield run
    grown = process.memory_info().rss - before
    assert grown < MOST_GROWN_BYTES, f"memory grew by {grown / 1024**2:.0f} MiB"


def test_handshakes(fuzz: Fuzz) -> None:
    def target(frame: bytes) -> None:
        decode_hello(frame)
        decode_welcome(frame)

    fuzz(target, mutated(HELLOS) | st.binary(max_size=100))


def test_frames_of_routers(fuzz: Fuzz) -> None:
    def target(frame: bytes) -> None:
        for decode in (decode_call, decode_order, decode_call_id):
            with contextlib.suppress(ExpertMeshError):
                decode(frame)  # type: ignore[operator]

    fuzz(target, to_group(HIDDEN, EXPERTS, LAYERS))


def test_replies_of_groups(fuzz: Fuzz) -> None:
    def target(frame: bytes, shape: tuple[int, int]) -> None:
        with contextlib.suppress(ExpertMeshError):
            decode_times(frame)
        with contextlib.suppress(ExpertMeshError):
            raise_for_status(decode_reply_head(frame), frame, 0, 1, shape)
            reply_rows(frame, shape)

    fuzz(target, mutated(REPLIES) | st.binary(max_size=100), st.tuples(st.integers(0, 4), st.integers(1, 9)))


# -- a group that lives ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def group(tiny: MakeTiny) -> Iterator[ExpertGroup]:
    path = tiny("mixtral")
    held = tuple(tuple(range(0, count, 2)) for count in experts_per_layer(path))
    made = ExpertGroup(0, held, config_for(path), threads=1)
    yield made
    made.close()


def _answers(group: ExpertGroup, stream: RouterStream) -> None:
    """All calls in flight are answered, and the group still computes."""
    limit = time.monotonic() + SLOWEST_S
    while stream.calls and time.monotonic() < limit:
        time.sleep(0.0005)
    assert not stream.calls, "a call was never answered"
    assert group.host.progress_age_s() < SLOWEST_S


def test_frames_at_a_living_group(fuzz: Fuzz, group: ExpertGroup, tiny: MakeTiny) -> None:
    hidden = _hidden(tiny("mixtral"))

    def target(frames: list[bytes]) -> None:
        stream = RouterStream(0, group.host)  # type: ignore[arg-type]
        with contextlib.suppress(ExpertMeshError):
            for frame in frames:
                stream.take(frame)
        _answers(group, stream)

    fuzz(target, st.lists(to_group(hidden, EXPERTS, LAYERS), min_size=1, max_size=4))


def test_frames_at_the_local_socket(fuzz: Fuzz, group: ExpertGroup) -> None:
    """Whole connections: what comes instead of a handshake. The group must go on accepting."""
    assert group.shm_server is not None
    address = b"\0" + group.shm_server.address.encode()

    def target(frames: list[bytes]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
            peer.settimeout(SLOWEST_S)
            peer.connect(address)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for frame in frames:
                    if frame:
                        peer.send(frame)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass

    fuzz(target, st.lists(mutated(HELLOS) | st.binary(min_size=1, max_size=100), min_size=1, max_size=3))
    assert len(os.listdir("/proc/self/fd")) < 500


def test_frames_of_a_router_over_shared_memory(
    fuzz: Fuzz, group: ExpertGroup, tiny: MakeTiny, caplog: pytest.LogCaptureFixture
) -> None:
    """After a good handshake; nothing is read or written outside the memory that the two share, nor by a call that has
    no go. Afterwards no call is left."""
    # What is logged is kept here, with the errors and all that these were raised in.
    caplog.set_level(logging.ERROR, "cluster.experts.shm_server")
    server = group.shm_server
    assert server is not None
    identity, size = server._identity, 1024 * 1024
    greeting = links_pb2.Hello(
        protocol=PROTOCOL_VERSION,
        fingerprint=identity.fingerprint,
        dtype=identity.dtype,
        secret=identity.secret,
        memory_bytes=size,
    )

    def target(calls: list[list[bytes]]) -> None:
        fd = os.memfd_create("expertmesh-fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer, os.fdopen(fd, "r+b") as memory:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            memory.write(b"\x01" * size)
            memory.flush()
            peer.settimeout(SLOWEST_S)
            peer.connect(b"\0" + server.address.encode())
            socket.send_fds(peer, [encode_hello(greeting)], [fd])
            assert decode_welcome(peer.recv(65536)) is not None
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                for frame in itertools.chain.from_iterable(calls):
                    if frame:
                        peer.send(frame[:60000])
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(65536):
                    pass
        limit = time.monotonic() + SLOWEST_S
        while server.num_links() and time.monotonic() < limit:
            time.sleep(0.0005)
        assert not server.num_links()
        assert group.host.progress_age_s() < SLOWEST_S

    fuzz(target, st.lists(local_calls(_hidden(tiny("mixtral")), LAYERS, size), min_size=1, max_size=4))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) < 500


def _hidden(path: Path) -> int:
    return int(Checkpoint(path).config.hidden_size)


# -- clients -----------------------------------------------------------------------------------------------------------

REQUESTS = st.builds(
    lambda prompt, ids, new, temperature, stop: (
        pb.GenerateRequest(
            prompt_ids=pb.TokenIds(ids=ids),
            max_new_tokens=new,
            temperature=temperature,
            stop=stop,
            received_ids=ids[:3],
        ).SerializeToString()
        + pb.GenerateRequest(prompt=prompt).SerializeToString()
    ),
    st.text(max_size=20),
    st.lists(st.integers(0, 600), max_size=20),
    st.integers(0, 2**31 - 1),
    st.floats(width=32),
    st.lists(st.text(max_size=5), max_size=3),
)


def test_requests_of_clients(fuzz: Fuzz) -> None:
    parse = _tolerant(pb.GenerateRequest)
    others = [
        _tolerant(kind) for kind in (pb.TokenizeRequest, pb.DetokenizeRequest, control_pb2.ChangePlacementRequest)
    ]
    context = TraceContext.of({})

    def target(data: bytes) -> None:
        for other in others:
            with contextlib.suppress(ExpertMeshError):
                parsed(other(data))
        with contextlib.suppress(ExpertMeshError):
            to_request(parsed(parse(data)), LIMITS, None, 5.0, context)

    fuzz(target, mutated(REQUESTS) | st.binary(max_size=100))


def test_metadata_of_clients(fuzz: Fuzz) -> None:
    parts = (
        st.sampled_from(["00", "ff", "-", "a" * 32, "0" * 32, "b" * 16, "01", "expertmesh=", ",", "=", " "]) | st.text()
    )
    values = st.lists(parts, max_size=8).map("".join)

    def target(traceparent: str, tracestate: str, authorization: str) -> None:
        context = TraceContext.of(
            {"traceparent": traceparent, "tracestate": tracestate, "x-moe-trace-detail": authorization}
        )
        assert len(context.trace_id) == 32
        for value in (authorization, authorization.encode("utf-8", "replace"), f"bearer {authorization}"):
            _bearer([("authorization", value)])

    fuzz(target, values, values, values)


def test_files_of_tokens(fuzz: Fuzz) -> None:
    lines = st.sampled_from(
        ["tokens:", "- name: a", "  name: a", "  sha256: " + "ab" * 32, "  expires: 2030-13-01", "  expires: 1e400"]
        + ["  concurrent: 1", "  control: yes", "- [", "*a", "&a", "  requests_per_minute: 0x10", "tokens: !!set {a}"]
    )
    texts = st.lists(lines | st.text(max_size=10), max_size=8).map("\n".join)

    def target(text: str) -> None:
        with contextlib.suppress(ConfigError):
            parse_grants(text, "file")

    fuzz(target, texts)


def test_a_call_must_be_answered_whatever_it_names(group: ExpertGroup, tiny: MakeTiny) -> None:
    """The control: the group answers good calls while it is being fuzzed, and a call for nobody with a typed error."""
    hidden = _hidden(tiny("mixtral"))
    stream = RouterStream(0, group.host)  # type: ignore[arg-type]
    rows = LayerRows.of(torch.randn(1, hidden), [0], [0], [1.0])
    stream.take(encode_call(LayerCall(1, 1, 0, 1, 1), rows))
    stream.take(encode_call(LayerCall(2, 1, 77, 1, 1), rows))
    _answers(group, stream)
    frames = [stream.outbox.get(timeout=5) for _ in range(2)]
    heads = {decode_times(frame)[0]: decode_reply_head(frame) for frame in frames if frame is not None}
    assert heads[1].status is ReplyStatus.OK
    assert heads[2].status is not ReplyStatus.OK
