"""A real server under those who want to keep it from others: idle connections, garbage, a message of a gigabyte. Honest
clients are served throughout, and memory is bounded. Prints what it saw; times are compared within the run."""

from __future__ import annotations

import random
import resource
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import grpc
import psutil
import pytest

from cluster.api.client import Client
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.rpc.v1 import inference_pb2_grpc
from cluster.settings import ClientSecurity
from tests.e2e.processes import ServeProcess

PLAIN = ClientSecurity()
MOST_GROWN_BYTES = 1024**3


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    process = ServeProcess("--groups", "2", "--dtype", "fp32", log=tmp_path_factory.mktemp("flood") / "log")
    yield process
    status, left = process.stop()
    assert status == 0
    assert not left


class Honest:
    """A client that asks again and again on new connections. ``waits``: when, and seconds to the first token."""

    def __init__(self, address: str) -> None:
        self._address, self._stop = address, threading.Event()
        self.waits: list[tuple[float, float]] = []
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            ids = pb.TokenIds(ids=[random.randrange(3, 500) for _ in range(8)])
            request = pb.GenerateRequest(prompt_ids=ids, max_new_tokens=4, ignore_eos=True)
            started_s = time.monotonic()
            try:
                with Client(self._address, timeout_s=30, resume_s=0, security=PLAIN) as client:
                    chunks = client.generate(request)
                    next(chunks)
                    self.waits.append((started_s, time.monotonic() - started_s))
                    list(chunks)
            except Exception as exc:  # noqa: BLE001 (whatever it is, it should not have been)
                self.failed.append(f"{type(exc).__name__}: {exc}")
            time.sleep(0.05)

    def median(self, since_s: float, until_s: float) -> float:
        """Of the waits that began between the two."""
        return statistics.median(wait for at, wait in self.waits if since_s <= at < until_s)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(60)


def _router_bytes(address: str) -> int:
    with Client(address, security=PLAIN) as client:
        return int(psutil.Process(client.status().router.pid).memory_info().rss)


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_flood_keeps_nobody_out(flooded: ServeProcess) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - 2_000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    host, port = flooded.address.split(":")
    honest, idle, rng = Honest(flooded.address), [], random.Random()
    try:
        time.sleep(8)
        before_bytes, calm_s = _router_bytes(flooded.address), time.monotonic()
        for number in range(count):
            peer = socket.create_connection((host, int(port)), timeout=10)
            if number % 4 == 0:
                with suppress(OSError):
                    peer.sendall(rng.randbytes(rng.randrange(1, 2048)))
            idle.append(peer)
        connected_s = time.monotonic()
        time.sleep(10)
        flooded_s, grown = time.monotonic(), _router_bytes(flooded.address) - before_bytes
        options = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
        with grpc.insecure_channel(flooded.address, options=options) as channel:
            with pytest.raises(grpc.RpcError) as error:
                inference_pb2_grpc.InferenceStub(channel).Tokenize(pb.TokenizeRequest(text="x" * 1024**3), timeout=120)
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        giant = _router_bytes(flooded.address) - before_bytes
    finally:
        for peer in idle:
            peer.close()
        honest.end()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    usual, meanwhile = honest.median(0, calm_s), honest.median(connected_s, flooded_s)
    print(
        f"\n{count} connections in {connected_s - calm_s:.1f} s: first token {1e3 * usual:.0f} ms before, "
        f"{1e3 * meanwhile:.0f} ms while they are there ({meanwhile / usual:.2f} x), memory +{grown / 1024**2:.0f} "
        f"MiB; +{giant / 1024**2:.0f} MiB after a message of 1 GiB; {len(honest.waits)} honest requests"
    )
    assert honest.failed == []
    assert max(grown, giant) < MOST_GROWN_BYTES
