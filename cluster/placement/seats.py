"""Who sits where: a node, physical cores and a GPU for the router and every group of a host. Pure functions.

With GPUs, a process belongs beside its GPU: the physical cores of a node are divided evenly among the GPUs there, by
PCI address, so that every process finds its share without asking the others. Without GPUs, groups are spread over the
nodes that have cores, and the router has a share on the first. A host with one node is left as it is: the scheduler of
the system knows nothing worse than we do, and processes that take turns want the same cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.placement.numa import Core, Gpu, Topology, format_list, gpu_distance

ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Seat:
    """One process: its node and the node of its memory (another one where its own has none), CPUs of its physical
    cores, compute threads, and its GPU's PCI address. ``shared``: other processes have the same cores."""

    role: str
    node: int
    memory_node: int
    cpus: tuple[int, ...]
    threads: int
    gpu: str | None = None
    shared: bool = False


@dataclass(frozen=True, slots=True)
class SeatPlan:
    """All processes of a host. Nothing is bound where ``bind`` is False; ``notes`` say why things are as they are."""

    seats: tuple[Seat, ...]
    bind: bool
    notes: tuple[str, ...] = ()


def plan_seats(topology: Topology, groups: int, gpus: bool | None = None) -> SeatPlan:
    """The plan for a router and ``groups`` groups. ``gpus``: use them; default: where there is one for each process."""
    roles = [ROUTER, *(f"group-{number}" for number in range(groups))]
    notes = _notes(topology)
    if gpus is None:
        gpus = len(topology.gpus) >= len(roles)
        if topology.gpus and not gpus:
            notes.append(f"{len(topology.gpus)} GPUs for {len(roles)} processes: planned without GPUs")
    homes = [node.node for node in topology.nodes if topology.cores_of(node.node)]
    if len(homes) < 2:
        notes.append("one node with CPUs: nothing is bound")
        return SeatPlan(tuple(_everywhere(topology, role) for role in roles), False, tuple(notes))
    if gpus:
        seats = [_beside(topology, role, gpu) for role, gpu in zip(roles, order_gpus(topology.gpus), strict=False)]
        lonely = [seat.gpu for seat in seats if seat.node < 0]
        if lonely:
            notes.append(f"the system does not tell the node of {', '.join(str(pci) for pci in lonely)}: not bound")
    else:
        seats = _spread(topology, roles, homes)
    if any(seat.shared for seat in seats):
        notes.append("fewer physical cores than processes on a node: some share theirs")
    return SeatPlan(tuple(seats), True, tuple(notes))


def _notes(topology: Topology) -> list[str]:
    notes = []
    bare = [node.node for node in topology.nodes if not node.memory_bytes]
    if bare:
        notes.append(f"nodes without memory: {format_list(bare)}; their processes use the nearest memory")
    idle = [node.node for node in topology.nodes if node.memory_bytes and not topology.cores_of(node.node)]
    if idle:
        notes.append(f"nodes without usable CPUs: {format_list(idle)}; their memory is left alone")
    packages = {core.package for core in topology.cores}
    inhabited = {core.node for core in topology.cores}
    if len(inhabited) > len(packages):
        notes.append(f"{len(inhabited)} nodes in {len(packages)} packages (sub-NUMA clustering)")
    if topology.quota_cpus is not None and topology.quota_cpus < len(topology.cores):
        notes.append(f"a cgroup quota of {topology.quota_cpus:g} CPUs: threads are not more than that")
    return notes


def order_gpus(gpus: Sequence[Gpu]) -> list[Gpu]:
    """The first by PCI address, which is the router's, and then its nearest neighbours first."""
    ordered = sorted(gpus, key=lambda gpu: gpu.pci)
    if not ordered:
        return []
    rank = {"switch": 0, "root": 1, "node": 2, "remote": 3}
    first = ordered[0]
    return [first, *sorted(ordered[1:], key=lambda gpu: (rank[gpu_distance(first, gpu)], gpu.pci))]


def _threads(topology: Topology, cores: Sequence[Core], processes: int = 1) -> int:
    count = len(cores)
    if topology.quota_cpus is not None:
        count = min(count, int(topology.quota_cpus // processes))
    return max(1, count)


def _everywhere(topology: Topology, role: str) -> Seat:
    cpus = tuple(cpu for core in topology.cores for cpu in core.cpus)
    node = topology.cores[0].node if topology.cores else topology.nodes[0].node
    return Seat(role, node, topology.nearest_memory(node), cpus, _threads(topology, topology.cores), shared=True)


def _share(cores: Sequence[Core], rank: int, of: int) -> tuple[list[Core], bool]:
    """One of ``of`` even parts; single cores taken in turn where there are not enough."""
    if len(cores) < of:
        return [cores[rank % len(cores)]], True
    first, last = rank * len(cores) // of, (rank + 1) * len(cores) // of
    return list(cores[first:last]), False


def _beside(topology: Topology, role: str, gpu: Gpu) -> Seat:
    if gpu.node is None:
        return Seat(role, -1, -1, (), _threads(topology, topology.cores, len(topology.gpus)), gpu.pci, shared=True)
    neighbours = sorted(item.pci for item in topology.gpus if item.node == gpu.node)
    cores = topology.cores_of(gpu.node)
    home = gpu.node
    if not cores:  # a node without CPUs: the nearest one that has some
        distances = topology.node(gpu.node).distances
        inhabited = {core.node for core in topology.cores}
        home = min(inhabited, key=lambda node: (distances.get(node, 255), node))
        cores = topology.cores_of(home)
    share, shared = _share(cores, neighbours.index(gpu.pci), len(neighbours))
    cpus = tuple(cpu for core in share for cpu in core.cpus)
    threads = _threads(topology, share, len(topology.gpus))
    return Seat(role, home, topology.nearest_memory(home), cpus, threads, gpu.pci, shared)


def _spread(topology: Topology, roles: Sequence[str], homes: Sequence[int]) -> list[Seat]:
    """Round robin over the nodes, each of which is divided among those that sit there."""
    at = {role: homes[number % len(homes)] for number, role in enumerate(roles)}
    seats = []
    for role in roles:
        node = at[role]
        here = [other for other in roles if at[other] == node]
        share, shared = _share(topology.cores_of(node), here.index(role), len(here))
        cpus = tuple(cpu for core in share for cpu in core.cpus)
        threads = _threads(topology, share, len(roles))
        seats.append(Seat(role, node, topology.nearest_memory(node), cpus, threads, shared=shared))
    return seats
