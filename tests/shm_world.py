"""Groups over shared memory in this process, and a dispatcher that asks them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from cluster.core import Deadline, GroupInfo, Order
from cluster.errors import ExpertMeshError
from cluster.experts.host import ExpertHost
from cluster.experts.identity import Identity
from cluster.experts.shm_server import ShmServer
from cluster.routing.step import StepContext
from cluster.rpc.v1 import links_pb2
from cluster.transport.base import LayerRows
from cluster.transport.shm import ShmTransport
from tests.unit.test_dispatcher import World, batch, compute, wanted

SOON = 10.0


class Group:
    """One that is reached over shared memory, in this process."""

    def __init__(self, number: int, world: ShmWorld) -> None:
        self.number, self.world = number, world
        self.open, self.entered = threading.Event(), threading.Event()
        self.open.set()
        self.errors: list[ExpertMeshError] = []
        self.orders: list[Order] = []
        self.host = ExpertHost(self.compute, threads=1, on_order=self.orders.append)
        self.server = ShmServer(Identity(number, "i", "f", "fp32", "s"), self.host)

    def compute(self, layer: int, rows: LayerRows) -> torch.Tensor:
        self.entered.set()
        self.open.wait(SOON)
        self.world.asked.append((self.number, layer, rows.pairs_3P.shape[1]))
        if self.errors:
            raise self.errors.pop()
        return compute(rows)

    def close(self) -> None:
        self.open.set()
        self.server.close()
        self.host.close()


class ShmWorld(World):
    def __init__(self, num_groups: int, layers: int = 1, copies: int = 1) -> None:
        self.groups: dict[int, Group] = {}
        self.asked: list[tuple[int, int, int]] = []
        """Group, layer and number of pairs of each call that was computed."""
        super().__init__(num_groups, layers, copies)
        for group in self.infos:
            self.groups[group] = Group(group, self)
            self.fabric.link(group)

    def connect(self, info: GroupInfo) -> ShmTransport:  # type: ignore[override]
        hello = links_pb2.Hello(fingerprint="f", dtype="fp32", secret="s")
        return ShmTransport(info.group, self.groups[info.group].server.address, hello, Deadline.after(SOON))

    def link(self, group: int) -> ShmTransport:
        link = self.fabric.link(group)
        assert isinstance(link, ShmTransport)
        return link


def right(world: ShmWorld, dispatcher: Callable[..., torch.Tensor], step: StepContext, num_tokens: int) -> None:
    for layer in range(world.layers):
        given = batch(num_tokens)
        assert torch.allclose(dispatcher(step, layer, *given), wanted(*given), atol=1e-5)


def trust_again(world: ShmWorld) -> None:
    world.fabric._suspects.clear()
    world.fabric._copies, world.fabric.view = {}, object()
