"""A group whose experts do what tests want, with all data-plane servers: in this process, or in one to be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import torch

from cluster.core import Deadline, LayerCall, Priority
from cluster.errors import MissingExperts
from cluster.experts.host import ExpertHost
from cluster.experts.identity import Identity
from cluster.experts.server import DataPlaneServer, Offers
from cluster.experts.shm_server import ShmServer
from cluster.rpc.v1 import links_pb2
from cluster.transport.base import LayerRows, Transport
from cluster.transport.grpc_link import GrpcTransport
from cluster.transport.inproc import InprocTransport
from cluster.transport.shm import ShmTransport

SOON = 20.0
GROUP = 4
BLOCKED, LACKING, FAILING = 1, 2, 3
"""Layers that wait until `Compute.open` is set, that lack experts, that fail; all others add one."""


class Compute:
    """Adds one, and notes the order of calls by the first number of their rows."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.order: list[float] = []

    def __call__(self, layer: int, rows: LayerRows) -> torch.Tensor:
        if rows.hidden_TH.numel():
            self.order.append(float(rows.hidden_TH[0, 0]))
        if layer == BLOCKED:
            self.entered.set()
            assert self.open.wait(SOON)
        if layer == LACKING:
            raise MissingExperts(GROUP, layer, [7, 9])
        if layer == FAILING:
            raise ValueError("boom")
        return rows.hidden_TH.float() + 1


def hello(**fields: object) -> links_pb2.Hello:
    return links_pb2.Hello(**{"fingerprint": "model", "dtype": "fp32", "secret": "secret", **fields})  # type: ignore[arg-type]


def rows(tokens: int, hidden: int = 8, dtype: torch.dtype = torch.float32) -> LayerRows:
    hidden_TH = torch.randint(-100, 100, (tokens, hidden)).to(dtype)
    if dtype is not torch.int8:
        hidden_TH = torch.randn(tokens, hidden).to(dtype)
    count = torch.arange(tokens)
    return LayerRows.of(hidden_TH, count, count % 5, torch.rand(tokens))


def call(number: int, layer: int = 0, priority: Priority = Priority.DECODE) -> LayerCall:
    return LayerCall(number, 1, layer, 1, 1, priority)


def soon() -> Deadline:
    return Deadline.after(SOON)


class EchoGroup:
    """In this process."""

    def __init__(self) -> None:
        self.compute = Compute()
        self.host = ExpertHost(self.compute)
        identity = Identity(GROUP, "born", "model", "fp32", "secret")
        self.shm = ShmServer(identity, self.host)
        self.server = DataPlaneServer(identity, self.host, "127.0.0.1", "127.0.0.1", Offers(self.shm.address))
        self.addresses = {"shm": self.shm.address, "grpc": self.server.address}

    def drop(self, kind: str) -> None:
        """Ends all links of a kind, as a fault would."""
        (self.shm if kind == "shm" else self.server).drop_links()

    def close(self) -> None:
        self.compute.open.set()
        self.server.close(0)
        self.shm.close()
        self.host.close()


class EchoProcess:
    """As a process of its own, that can be killed or stopped."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.echo"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.addresses: dict[str, str] = json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait(SOON)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def connect(kind: str, group: EchoGroup | EchoProcess, payload_timeout_s: float = 10.0, **fields: object) -> Transport:
    """A link of a kind to the group."""
    if kind == "inproc":
        assert isinstance(group, EchoGroup)
        return InprocTransport(GROUP, group.host)
    if kind == "shm":
        return ShmTransport(GROUP, group.addresses["shm"], hello(**fields), soon())
    payload = "" if kind == "grpc" else kind
    device = torch.device("cuda" if kind == "nccl" else "cpu")
    return GrpcTransport(GROUP, group.addresses["grpc"], hello(**fields), soon(), payload, payload_timeout_s, device)


if __name__ == "__main__":
    made = EchoGroup()
    sys.stdout.write(json.dumps(made.addresses) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
