"""Puts a process on its seat at birth, and says afterwards where it really is.

To be called before anything big is allocated and before compute threads start: they inherit what is set here.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

from cluster.core import Clock
from cluster.errors import ConfigError
from cluster.placement import numa
from cluster.placement.numa import Topology, format_list
from cluster.placement.seats import ROUTER, Seat, plan_seats

log = logging.getLogger(__name__)

AUTO, OFF, STRICT = "auto", "off", "strict"
MODES = (AUTO, OFF, STRICT)
ENOUGH_LOCAL = 0.95
"""Of anonymous memory: interpreter and libraries were loaded before anybody could be asked."""
REFRESH_S = 300.0
"""Reading a process's map of gigabytes takes long, with the map locked."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a process is. ``node`` is -1 where it was not bound; ``local_ratio`` is the share of its memory that lies
    on the node it belongs to, None where nobody knows."""

    node: int = -1
    cpus: str = ""
    threads_elsewhere: int = 0
    local_ratio: float | None = None
    note: str = ""


def seat_of(topology: Topology, role: str, groups: int, gpu: str | None, hosts: int) -> tuple[Seat | None, str]:
    """The seat of a process, and why there is none. ``gpu`` is the PCI address of its own; ``hosts``: how many machines
    share the groups."""
    plan = plan_seats(topology, groups, gpus=bool(gpu))
    if not plan.bind:
        return None, plan.notes[-1]
    if gpu:
        for seat in plan_seats(topology, len(topology.gpus) - 1, gpus=True).seats:
            if seat.gpu == gpu.lower() and seat.node >= 0:
                return seat, ""
        return None, f"the system does not tell the node of GPU {gpu}"
    seat = next(item for item in plan.seats if item.role == role)
    if hosts > 1:  # nobody knows which groups share this machine: a node, and all of its cores
        cpus = tuple(cpu for core in topology.cores_of(seat.node) for cpu in core.cpus)
        threads = min(len(topology.cores_of(seat.node)), int(topology.quota_cpus or len(cpus)) or 1)
        return Seat(role, seat.node, seat.memory_node, cpus, threads, shared=True), ""
    return seat, ""


def numa_attributes(binding: Binding | None) -> dict[str, str | int]:
    """For the resource of a process's telemetry."""
    return {"moe.numa.node": binding.seat.node} if binding is not None and binding.seat is not None else {}


class Binding:
    """Takes the seat (constructor), checks it (`check`), and tells about it (`where`).

    Raises (constructor):
        ConfigError: mode is strict, and the kernel refuses.
    """

    def __init__(
        self,
        mode: str,
        role: str,
        groups: int,
        gpu: str | None = None,
        hosts: int = 1,
        topology: Topology | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._mode, self._clock = mode, clock
        self._lock = threading.Lock()
        self._told: Where | None = None
        self._told_s = 0.0
        self.seat: Seat | None = None
        if mode == OFF:
            self.note = "off"
            return
        self._topology = numa.read_topology() if topology is None else topology
        self.seat, self.note = seat_of(self._topology, role, groups, gpu, hosts)
        if self.seat is not None:
            self._bind(self.seat)

    @classmethod
    def of_router(cls, mode: str, groups: int, gpu: str | None, hosts: int) -> Binding:
        """The router's."""
        return cls(mode, ROUTER, groups, gpu, hosts)

    @classmethod
    def of_group(cls, mode: str, group: int, groups: int, gpu: str | None, hosts: int) -> Binding:
        """A group's."""
        return cls(mode, f"group-{group}", groups, gpu, hosts)

    def _bind(self, seat: Seat) -> None:
        try:
            numa.set_memory_policy([seat.memory_node], strict=self._mode == STRICT)
            count = numa.bind_threads(seat.cpus)
        except OSError as exc:
            if self._mode == STRICT:
                raise ConfigError(f"numa: got strict; this process cannot be bound to node {seat.node}: {exc}") from exc
            log.warning("not bound to node %d: %s", seat.node, exc)
            self.seat, self.note = None, f"not bound: {exc}"
            return
        log.info("bound to node %d, CPUs %s, %d threads", seat.node, format_list(seat.cpus), count)

    def threads(self, otherwise: int) -> int:
        """Compute threads: one for each physical core of the seat."""
        return self.seat.threads if self.seat is not None else otherwise

    def check(self) -> None:
        """To be called when everything is loaded.

        Raises:
            ConfigError: mode is strict, and threads or memory are elsewhere.
        """
        if self._mode != STRICT:
            return
        where = self.where()
        if where.threads_elsewhere:
            raise ConfigError(
                f"numa: got strict; {where.threads_elsewhere} threads may run on other CPUs than {where.cpus}"
            )
        if where.local_ratio is not None and where.local_ratio < ENOUGH_LOCAL:
            node = self.seat.memory_node if self.seat is not None else 0
            raise ConfigError(
                f"numa: got strict; {where.local_ratio:.0%} of the memory lies on node {node}, must be "
                f"{ENOUGH_LOCAL:.0%}: free some there, or use auto"
            )

    def where(self) -> Where:
        """What the kernel says, not older than a few minutes."""
        with self._lock:
            if self._told is None or self._clock() - self._told_s > REFRESH_S:
                self._told, self._told_s = self._look(), self._clock()
            return self._told

    def _look(self) -> Where:
        if self._mode == OFF:
            return Where(note=self.note)
        seat = self.seat
        if seat is None:
            nodes = [node for node in self._topology.nodes if node.memory_bytes]
            # With one node there is nowhere else: its map need not be read.
            return Where(local_ratio=1.0 if len(nodes) == 1 else None, note=self.note)
        elsewhere = len(numa.threads_elsewhere(seat.cpus))
        return Where(seat.node, format_list(seat.cpus), elsewhere, numa.local_ratio(seat.memory_node), self.note)
