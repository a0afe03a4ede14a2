"""Sysfs trees of machines that are not here, made from short descriptions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.placement.numa import format_list

GIB = 1024**3


@dataclass(frozen=True)
class Machine:
    """``nodes``: cores of each (a core is a tuple of CPUs); ``memory``: GiB of each; ``package``: of each node."""

    nodes: Sequence[Sequence[tuple[int, ...]]]
    memory: Sequence[int]
    package: Sequence[int]
    distances: Sequence[Sequence[int]] = ()
    gpus: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    """PCI address: node (-1: not told), path of bridges."""
    offline: Sequence[int] = ()
    cpuset: str = ""
    quota: str = ""


def build(machine: Machine, root: Path) -> Path:
    """Writes the tree; returns its root."""

    def write(name: str, text: str) -> None:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    cpus = sorted(cpu for cores in machine.nodes for core in cores for cpu in core)
    online = [cpu for cpu in cpus if cpu not in machine.offline]
    write("devices/system/cpu/online", format_list(online))
    for number, cores in enumerate(machine.nodes):
        for core_id, core in enumerate(cores):
            together = [cpu for cpu in core if cpu in online]
            for cpu in core:
                place = f"devices/system/cpu/cpu{cpu}"
                (root / place).mkdir(parents=True, exist_ok=True)
                if cpu in online:  # the kernel takes the topology of a CPU away with it
                    write(f"{place}/topology/core_cpus_list", format_list(together))
                    write(f"{place}/topology/core_id", str(core_id))
                    write(f"{place}/topology/physical_package_id", str(machine.package[number]))
    write("devices/system/node/online", format_list(range(len(machine.nodes))))
    for number, cores in enumerate(machine.nodes):
        place = f"devices/system/node/node{number}"
        write(f"{place}/cpulist", format_list(cpu for core in cores for cpu in core if cpu in online))
        write(f"{place}/meminfo", f"Node {number} MemTotal:       {machine.memory[number] * GIB // 1024} kB")
        distances = (
            machine.distances[number]
            if machine.distances
            else [10 if number == other else 20 for other in range(len(machine.nodes))]
        )
        write(f"{place}/distance", " ".join(map(str, distances)))
    for pci, (node, path) in machine.gpus.items():
        device = f"devices/{path}/{pci}"
        write(f"{device}/vendor", "0x10de")
        write(f"{device}/class", "0x030200")
        write(f"{device}/numa_node", str(node))
        link = root / "bus/pci/devices" / pci
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(root / device, link.parent))
    if machine.cpuset:
        write("fs/cgroup/cpuset.cpus.effective", machine.cpuset)
    if machine.quota:
        write("fs/cgroup/cpu.max", machine.quota)
    return root


def cores(first: int, count: int, second_threads_from: int | None = None) -> list[tuple[int, ...]]:
    """Cores with CPUs from ``first`` on; their second hardware threads from another number on, as Linux counts them."""
    if second_threads_from is None:
        return [(first + i,) for i in range(count)]
    return [(first + i, second_threads_from + i) for i in range(count)]


LAPTOP = Machine([[(0, 1), (2, 3), (4, 5), (6, 7)]], [16], [0])

# Two packages of 32 cores with two threads each; four GPUs on each, two to a PCIe switch.
TWO_SOCKETS_8_GPUS = Machine(
    [cores(0, 32, 64), cores(32, 32, 96)],
    [512, 512],
    [0, 1],
    [[10, 21], [21, 10]],
    {
        f"0000:{bus:02x}:00.0": (node, f"pci0000:{root:02x}/0000:{root:02x}:01.0/0000:{root + 1:02x}:00.0")
        for node, root, buses in (
            (0, 0x10, (0x17, 0x18)),
            (0, 0x30, (0x37, 0x38)),
            (1, 0x90, (0x97, 0x98)),
            (1, 0xB0, (0xB7, 0xB8)),
        )
        for bus in buses
    },
)

# Two packages with four nodes each, eight cores a node, one thread a core.
EPYC_NPS4 = Machine(
    [cores(8 * node, 8) for node in range(8)],
    [64] * 8,
    [0] * 4 + [1] * 4,
    [[10 if a == b else 12 if a // 4 == b // 4 else 32 for b in range(8)] for a in range(8)],
)

# A container on such a server: six CPUs of two nodes, one of them without its sibling, and a quota.
CONTAINER = Machine(
    [cores(0, 32, 64), cores(32, 32, 96)],
    [512, 512],
    [0, 1],
    [[10, 21], [21, 10]],
    {},
    (),
    "2-3,32-33,66,96",
    "400000 100000",
)

# A node of memory only (CXL), a node of CPUs only, and two CPUs that are switched off.
ODD_NODES = Machine(
    [cores(0, 4), cores(4, 4), []],
    [64, 0, 256],
    [0, 1, 0],
    [[10, 21, 14], [21, 10, 24], [14, 24, 10]],
    {},
    (1, 6),
)
