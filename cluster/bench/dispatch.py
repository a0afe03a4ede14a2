"""`expertmesh bench dispatch`: what a layer call costs over each transport, beside the floor of the same bytes.

Two processes on cores of their own where there are two. A transport and its floor take turns of `TURN` calls, so that
both meet the same machine, and neither the other's caches; a ratio is of the two medians. The call goes the whole way
of a real one (codec, link, server, queue, compute thread) but for the experts, which echo.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import torch

from cluster.bench.children import end
from cluster.bench.echo import FLOOR_METHOD, IDENTITY, receive_exactly
from cluster.core import Deadline, LayerCall
from cluster.errors import InternalError, InvalidArgument, LinkBroken
from cluster.kernels.rows import MANY, Owners, can_divide
from cluster.rpc.v1 import links_pb2
from cluster.transport.base import LayerRows, Transport
from cluster.transport.collective import available
from cluster.transport.exchange import ShmExchange
from cluster.transport.grpc_link import CHANNEL_OPTIONS, GrpcTransport
from cluster.transport.shm import ShmTransport

FLOOR_OF = {"shm": "socket", "grpc": "grpc_echo", "gloo": "tcp", "nccl": "tcp"}
CALL_TIMEOUT_S = 30.0
PAIRS_PER_TOKEN, EXPERTS = 8, 256
MIN_SAMPLES, SLICES, TURN = 20, 5, 20

Measured = Callable[[], object]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Shapes:
    """Which calls are measured: every number of tokens with every hidden size; at most ``samples`` of each, and about
    ``seconds`` for one transport and its floor."""

    tokens: Sequence[int]
    hidden: Sequence[int]
    samples: int
    seconds: float

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise InvalidArgument("--seconds", self.seconds, "must be more than 0")
        for name, values in (("--tokens", self.tokens), ("--hidden", self.hidden)):
            if not values or min(values) < 1:
                raise InvalidArgument(name, list(values), "must be numbers from 1")
        if self.samples < MIN_SAMPLES:
            raise InvalidArgument("--samples", self.samples, f"must be at least {MIN_SAMPLES}")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.product(self.tokens, self.hidden)


# -- the two processes ---------------------------------------------------------------------------------------------


@contextmanager
def echo_process(role: str, core: int) -> Iterator[dict[str, str]]:
    """A process of `cluster.bench.echo` on a core (-1: any); its addresses."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.bench.echo", role, str(core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise InternalError("the echo process did not start")
        addresses: dict[str, str] = json.loads(line)
        yield addresses
    finally:
        end(process)
        process.stdout.close()


@contextmanager
def on_first_core() -> Iterator[int]:
    """This thread, and those it starts, on the first core; the second one's number, or -1 where there is none."""
    before = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    apart = len(before) > 1
    torch.set_num_threads(1)
    if apart:
        os.sched_setaffinity(0, {min(before)})
    try:
        yield sorted(before)[1] if apart else -1
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def hello() -> links_pb2.Hello:
    """The handshake that the echo group expects."""
    return links_pb2.Hello(fingerprint=IDENTITY.fingerprint, dtype=IDENTITY.dtype, secret=IDENTITY.secret)


def connect(kind: str, group: dict[str, str]) -> Transport:
    """A link to the echo group."""
    deadline = Deadline.after(CALL_TIMEOUT_S)
    if kind == "shm":
        return ShmTransport(0, group["shm"], hello(), deadline)
    device = torch.device("cuda" if kind == "nccl" else "cpu")
    return GrpcTransport(0, group["grpc"], hello(), deadline, "" if kind == "grpc" else kind, device=device)


def layer_rows(tokens: int, hidden: int) -> LayerRows:
    """Random rows that each want `PAIRS_PER_TOKEN` experts."""
    count = tokens * PAIRS_PER_TOKEN
    rows = np.repeat(np.arange(tokens), PAIRS_PER_TOKEN)
    return LayerRows.of(torch.randn(tokens, hidden), rows, np.random.randint(0, EXPERTS, count), np.random.rand(count))


class Caller:
    """Layer calls over one link, made as the dispatcher makes them: up to `MANY` floats over shared memory by an
    exchange. `check` compares an answer bit by bit."""

    def __init__(self, link: Transport, rows: LayerRows) -> None:
        self._link, self._rows, self._ids = link, rows, itertools.count(time.monotonic_ns())
        self._exchange: ShmExchange | None = None
        tokens, hidden = rows.hidden_TH.shape
        if isinstance(link, ShmTransport) and can_divide(rows.hidden_TH, 1, MANY):
            self._exchange = ShmExchange.over([link], tokens, hidden, rows.pairs_3P.shape[1], EXPERTS)
        self._owners = Owners(np.zeros(EXPERTS, np.int64), None)
        self._kept = [rows.pairs_3P[0].astype(np.int64), rows.pairs_3P[1].astype(np.int64), rows.pairs_3P[2].copy()]
        row_at, expert_at, weight_at = (array.ctypes.data for array in self._kept)
        self._pairs_at = row_at, expert_at, weight_at

    def __call__(self) -> torch.Tensor:
        """One round trip."""
        if self._exchange is not None:
            self._exchange.wake()
        call = LayerCall(next(self._ids), 1, 0, 1, 1)
        if self._exchange is not None:
            return self._exchanged(call, self._exchange)
        deadline = Deadline.after(CALL_TIMEOUT_S)
        return self._link.submit(call, self._rows, deadline).wait(deadline).partial_TH

    def _exchanged(self, call: LayerCall, exchange: ShmExchange) -> torch.Tensor:
        num_pairs = self._rows.pairs_3P.shape[1]
        if not exchange.enter():
            raise LinkBroken("the link is down")
        try:
            total_TH, _ = exchange.send(call, self._owners, self._rows.hidden_TH, self._pairs_at, num_pairs)
            if not exchange.wait(CALL_TIMEOUT_S):
                raise InternalError("the group did not answer")
            exchange.answers()
        finally:
            exchange.leave()
        return total_TH

    def check(self) -> None:
        """Raises InternalError unless the answer is the rows."""
        if not torch.equal(self(), self._rows.hidden_TH):
            raise InternalError(f"{self._link.kind} did not bring the rows back")


class SocketFloor:
    """Ping-pong of ``num_bytes`` over a plain socket."""

    def __init__(self, kind: str, address: str, num_bytes: int) -> None:
        if kind == "socket":
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(b"\0" + address.encode())
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(address)))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(None)
        self._socket.sendall(num_bytes.to_bytes(8, "little"))
        self._out = memoryview(np.random.bytes(num_bytes))
        self._in = memoryview(bytearray(num_bytes))

    def __call__(self) -> None:
        """One round trip."""
        self._socket.sendall(self._out)
        if not receive_exactly(self._socket, self._in):
            raise InternalError("the floor's process ended")

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()


class GrpcFloor:
    """Ping-pong of ``num_bytes`` over a bare gRPC stream, in the form that every tutorial has."""

    def __init__(self, address: str, num_bytes: int) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        method: Any = self._channel.stream_stream(FLOOR_METHOD)
        self._stream = method(iter(self._outbox.get, None))
        self._message = np.random.bytes(num_bytes)

    def __call__(self) -> None:
        """One round trip."""
        self._outbox.put(self._message)
        next(self._stream)

    def close(self) -> None:
        """Ends the stream."""
        self._outbox.put(None)
        self._channel.close()


def connect_floor(kind: str, address: str, num_bytes: int) -> SocketFloor | GrpcFloor:
    """A connection to the floors' process."""
    return GrpcFloor(address, num_bytes) if kind == "grpc_echo" else SocketFloor(kind, address, num_bytes)


# -- measuring -----------------------------------------------------------------------------------------------------


def interleave(contenders: dict[str, Measured], samples: int, seconds: float) -> dict[str, np.ndarray[Any, Any]]:
    """Seconds of each call, [samples]; the contenders take turns. The first turn of each is thrown away, and so is the
    first call of every turn where there are more. ``seconds`` bounds the whole, but for `MIN_SAMPLES` of each."""
    turn = max(1, min(TURN, samples // SLICES))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(turn):
            call()
    ends_s = time.monotonic() + seconds
    while len(next(iter(times.values()))) < samples:
        for name, call in contenders.items():
            if turn > 1:
                call()
            for _ in range(turn):
                began_s = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - began_s)
        if time.monotonic() > ends_s and len(times[name]) >= MIN_SAMPLES:
            break
        if time.monotonic() > ends_s:
            turn = 1  # only what is needed
    return {name: np.array(values) for name, values in times.items()}


def _us(times: np.ndarray[Any, Any], quantile: float) -> float:
    return round(float(np.quantile(times, quantile)) * 1e6, 1)


def row(
    kind: str, tokens: int, hidden: int, times: np.ndarray[Any, Any], floor: np.ndarray[Any, Any], num_bytes: int
) -> dict[str, Any]:
    """One entry of ``results``. The ratio's spread is that of consecutive fifths of the samples."""
    parts = zip(np.array_split(times, SLICES), np.array_split(floor, SLICES), strict=True)
    ratios = [float(np.median(mine) / np.median(theirs)) for mine, theirs in parts]
    return {
        "transport": kind,
        "tokens": tokens,
        "hidden": hidden,
        "p50_us": _us(times, 0.5),
        "p99_us": _us(times, 0.99),
        "samples": len(times),
        "floor_us": _us(floor, 0.5),
        "floor_p99_us": _us(floor, 0.99),
        "floor_kind": FLOOR_OF[kind],
        "ratio": round(float(np.median(times) / np.median(floor)), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
        "gb_per_s": round(2 * num_bytes / float(np.median(times)) / 1e9, 3),
    }


def measure(kinds: Sequence[str], shapes: Shapes, progress: Progress) -> dict[str, Any]:
    """All rows, and what a plain copy of the largest call's bytes moves both ways, beside shared memory if that is
    measured."""
    results: list[dict[str, Any]] = []
    copies: dict[str, Any] = {}
    with on_first_core() as other, echo_process("group", other) as group, echo_process("floors", other) as floors:
        with contextlib.ExitStack() as links:
            transports = {kind: connect(kind, group) for kind in kinds}
            for link in transports.values():
                links.callback(link.close)
            for tokens, hidden in shapes:
                progress(f"{tokens} tokens x {hidden}")
                results += _measure_shape(transports, floors, tokens, hidden, shapes)
            if "shm" in transports:
                copies = _measure_copy(transports["shm"], max(shapes, key=lambda shape: shape[0] * shape[1]), shapes)
    return {"results": results, "own_cores": other >= 0, **copies}


def _measure_shape(
    transports: dict[str, Transport], floors: dict[str, str], tokens: int, hidden: int, shapes: Shapes
) -> list[dict[str, Any]]:
    rows = layer_rows(tokens, hidden)
    num_bytes = rows.hidden_TH.nbytes
    results = []
    for kind, link in transports.items():
        caller, name = Caller(link, rows), FLOOR_OF[kind]
        caller.check()
        floor = connect_floor(name, floors[name], num_bytes)
        try:
            times = interleave({kind: caller, name: floor}, shapes.samples, shapes.seconds)
        finally:
            floor.close()
        results.append(row(kind, tokens, hidden, times[kind], times[name], num_bytes))
    return results


def _measure_copy(link: Transport, shape: tuple[int, int], shapes: Shapes) -> dict[str, Any]:
    rows = layer_rows(*shape)
    source = rows.hidden_TH.numpy()
    there, back = np.empty_like(source), np.empty_like(source)

    def copy() -> None:
        there[...] = source
        back[...] = there

    times = interleave({"shm": Caller(link, rows), "copy": copy}, shapes.samples, shapes.seconds)
    shm, plain = (2 * source.nbytes / float(np.median(times[name])) / 1e9 for name in ("shm", "copy"))
    return {
        "copy": {
            "tokens": shape[0],
            "hidden": shape[1],
            "memory_copy_gb_per_s": round(plain, 3),
            "shm_gb_per_s": round(shm, 3),
            "ratio": round(shm / plain, 3),
            "samples": len(times["copy"]),
        }
    }


def transports_here(asked: Sequence[str]) -> list[str]:
    """The transports to measure: those asked for, or all that this machine can run between two processes.

    Raises:
        InvalidArgument: one of them cannot run here.
    """
    two_gpus = torch.cuda.is_available() and torch.cuda.device_count() > 1
    have = ["shm", "grpc", *(kind for kind in available() if kind == "gloo" or two_gpus)]
    for kind in asked:
        if kind not in have:
            raise InvalidArgument("--transport", kind, f"this machine can run {', '.join(have)}")
    return list(asked) or have
