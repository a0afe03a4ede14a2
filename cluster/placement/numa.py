"""NUMA: what a machine looks like, binding a process to a part of it, and reading back what really happened.

Standard library and raw system calls only, and nothing of this project: the file runs by itself in a bare virtual
machine (`make test-numa`). Topology comes from sysfs under a root that may be another machine's copy.

Memory policy and affinity are per thread (set_mempolicy(2), sched_setaffinity(2)), so threads that exist already must
be bound one by one, and their policy cannot be changed from outside: whatever allocates must start afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SYSFS = Path("/sys")
GPU_VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
_DISPLAY = ("0x0300", "0x0302", "0x0380", "0x1200")
_PCI = re.compile(r"^[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9a-f]$")


@dataclass(frozen=True, slots=True)
class Core:
    """A physical core: the CPUs (hardware threads) of it that may be used, and the node and package it is in."""

    cpus: tuple[int, ...]
    node: int
    package: int


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node. ``memory_bytes`` is 0 where there is none; ``distances`` are by node id (10 is local)."""

    node: int
    cpus: tuple[int, ...]
    memory_bytes: int
    distances: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Gpu:
    """An accelerator on PCI. ``node`` is None where the system does not tell; ``path`` are the bridges above it."""

    pci: str
    node: int | None
    vendor: str
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """A machine, as far as this process may use it. ``quota_cpus``: what a cgroup lets it use at a time, if less."""

    nodes: tuple[Node, ...]
    cores: tuple[Core, ...]
    gpus: tuple[Gpu, ...] = ()
    quota_cpus: float | None = None

    def node(self, number: int) -> Node:
        """One node."""
        return next(node for node in self.nodes if node.node == number)

    def cores_of(self, number: int) -> list[Core]:
        """Physical cores of a node that may be used, in order."""
        return [core for core in self.cores if core.node == number]

    def nearest_memory(self, number: int) -> int:
        """The node itself, or the nearest one that has memory (the lowest of those that are alike)."""
        here = self.node(number)
        if here.memory_bytes:
            return number
        others = [node for node in self.nodes if node.memory_bytes]
        return min(others, key=lambda node: (here.distances.get(node.node, 255), node.node)).node if others else number


# -- topology ------------------------------------------------------------------------------------------------------


def parse_list(text: str) -> list[int]:
    """Numbers of a kernel list such as "0-3,8,10-11"; empty for nothing."""
    found: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    return found


def format_list(numbers: Iterable[int]) -> str:
    """The kernel's form of some numbers."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts)


def read_topology(sysfs: Path = SYSFS, affinity: Iterable[int] | None = None) -> Topology:
    """The machine under a sysfs root. ``affinity`` limits CPUs; by default it is this process's own where ``sysfs`` is
    the running system's. A kernel without NUMA is one node with everything."""
    if affinity is None and sysfs == SYSFS:
        affinity = os.sched_getaffinity(0)
    cpu_root, node_root = sysfs / "devices/system/cpu", sysfs / "devices/system/node"
    online = parse_list(_read(cpu_root / "online")) or _numbered(cpu_root, "cpu")
    usable = set(online)
    for name in ("cpuset.cpus.effective", "cpuset/cpuset.effective_cpus"):
        limited = parse_list(_read(sysfs / "fs/cgroup" / name))
        usable = usable & set(limited) if limited else usable
    if affinity is not None:
        usable &= set(affinity)
    nodes = _nodes(node_root, usable, online)
    node_of = {cpu: node.node for node in nodes for cpu in node.cpus}
    cores = _cores(cpu_root, usable, node_of)
    return Topology(tuple(nodes), tuple(cores), tuple(_gpus(sysfs)), _quota(sysfs))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _numbered(directory: Path, prefix: str) -> list[int]:
    if not directory.is_dir():
        return []
    names = (entry.name.removeprefix(prefix) for entry in directory.iterdir() if entry.name.startswith(prefix))
    return sorted(int(name) for name in names if name.isdecimal())


def _nodes(root: Path, usable: set[int], online: Sequence[int]) -> list[Node]:
    numbers = parse_list(_read(root / "online")) or _numbered(root, "node")
    if not numbers:
        return [Node(0, tuple(cpu for cpu in online if cpu in usable), _physical_bytes(), {0: 10})]
    found = []
    for number in numbers:
        directory = root / f"node{number}"
        cpus = tuple(cpu for cpu in parse_list(_read(directory / "cpulist")) if cpu in usable)
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(directory / "meminfo"))
        distances = [int(part) for part in _read(directory / "distance").split()]
        memory = int(total.group(1)) * 1024 if total else 0
        found.append(Node(number, cpus, memory, dict(zip(numbers, distances, strict=False))))
    return found


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0


def _cores(root: Path, usable: set[int], node_of: Mapping[int, int]) -> list[Core]:
    """Physical cores by their first CPU; hardware threads that may not be used are left out of them."""
    found: dict[tuple[int, ...], Core] = {}
    for cpu in sorted(usable):
        topology = root / f"cpu{cpu}" / "topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        together = tuple(number for number in (parse_list(siblings) or [cpu]) if number in usable) or (cpu,)
        package = _read(topology / "physical_package_id")
        number = int(package) if package.lstrip("-").isdecimal() else 0
        found.setdefault(together, Core(together, node_of.get(cpu, 0), max(0, number)))
    return sorted(found.values(), key=lambda core: core.cpus)


def _gpus(sysfs: Path) -> list[Gpu]:
    root = sysfs / "bus/pci/devices"
    if not root.is_dir():
        return []
    found = []
    for entry in sorted(root.iterdir()):
        vendor = GPU_VENDORS.get(_read(entry / "vendor"))
        if vendor is None or not _read(entry / "class").startswith(_DISPLAY):
            continue
        told = _read(entry / "numa_node")
        node = int(told) if told.lstrip("-").isdecimal() and int(told) >= 0 else None
        above = tuple(part for part in entry.resolve().parent.parts if _PCI.match(part) or part.startswith("pci"))
        found.append(Gpu(entry.name, node, vendor, above))
    return found


def _quota(sysfs: Path) -> float | None:
    quota, _, period = _read(sysfs / "fs/cgroup/cpu.max").partition(" ")
    if quota.isdecimal() and period.isdecimal() and int(period):
        return int(quota) / int(period)
    return None


def gpu_distance(first: Gpu, second: Gpu) -> str:
    """ "switch" under one PCIe switch, "root" under one root port or bridge, "node" on one NUMA node, else "remote"."""
    common = 0
    for mine, theirs in zip(first.path, second.path, strict=False):
        if mine != theirs:
            break
        common += 1
    if common >= 3:  # the host bridge, a root port, and a port of a switch
        return "switch"
    if common == 2:
        return "root"
    return "node" if first.node is not None and first.node == second.node else "remote"


# -- binding -------------------------------------------------------------------------------------------------------

MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND = 0, 1, 2
_MPOL_MF_MOVE = 2
_CALLS = {"x86_64": {"mbind": 237, "set": 238, "get": 239}, "aarch64": {"mbind": 235, "get": 236, "set": 237}}
_MASK_BITS = 1024


class NumaError(OSError):
    """The kernel did not do what was asked, or knows no NUMA."""


def _mask(nodes: Iterable[int]) -> ctypes.Array[ctypes.c_ulong]:
    bits = ctypes.sizeof(ctypes.c_ulong) * 8
    mask = (ctypes.c_ulong * (_MASK_BITS // bits))()
    for node in nodes:
        mask[node // bits] |= 1 << (node % bits)
    return mask


def _call(name: str, *arguments: object) -> int:
    numbers = _CALLS.get(platform.machine())
    if numbers is None:
        raise NumaError(0, f"memory policies are not known on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = int(libc.syscall(ctypes.c_long(numbers[name]), *arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise NumaError(number, f"{name}: {os.strerror(number)}")
    return result


def set_memory_policy(nodes: Iterable[int], strict: bool = False) -> None:
    """Memory that this thread allocates from now on comes from these nodes: from nowhere else (``strict``), or first of
    all. Threads that it starts inherit the policy. No nodes: the system's default again.

    Raises:
        NumaError: the kernel refuses.
    """
    wanted = list(nodes)
    mode = (MPOL_BIND if strict else MPOL_PREFERRED) if wanted else MPOL_DEFAULT
    mask = _mask(wanted if strict else wanted[:1])
    _call("set", ctypes.c_int(mode), mask if wanted else None, ctypes.c_ulong(_MASK_BITS if wanted else 0))


def memory_policy() -> tuple[int, list[int]]:
    """Mode and nodes of this thread's policy.

    Raises:
        NumaError: the kernel refuses.
    """
    mode, mask = ctypes.c_int(), _mask(())
    _call("get", ctypes.byref(mode), mask, ctypes.c_ulong(_MASK_BITS), None, ctypes.c_ulong(0))
    bits = ctypes.sizeof(ctypes.c_ulong) * 8
    return mode.value, [index for index in range(_MASK_BITS) if mask[index // bits] >> (index % bits) & 1]


def bind_memory(address: int, num_bytes: int, node: int) -> None:
    """Whole pages of a buffer lie on a node from now on; those that are elsewhere move there.

    Raises:
        NumaError: the kernel refuses.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    first = -(-address // page) * page
    last = (address + num_bytes) // page * page
    if last > first:
        span = ctypes.c_ulong(last - first)
        flags = ctypes.c_uint(_MPOL_MF_MOVE)
        _call(
            "mbind",
            ctypes.c_void_p(first),
            span,
            ctypes.c_int(MPOL_BIND),
            _mask([node]),
            ctypes.c_ulong(_MASK_BITS),
            flags,
        )


def bind_threads(cpus: Iterable[int]) -> int:
    """Sets the affinity of every thread of this process; how many there were. New threads inherit it from whoever
    starts them, so it is done again until no thread is new.

    Raises:
        OSError: a CPU may not be used.
    """
    wanted = set(cpus)
    seen: set[int] = set()
    while True:
        tasks = {int(name) for name in os.listdir("/proc/self/task")} - seen
        if not tasks:
            return len(seen)
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(task, wanted)
        seen |= tasks


# -- reading back --------------------------------------------------------------------------------------------------


def threads_elsewhere(cpus: Iterable[int], process: int | str = "self") -> list[int]:
    """Threads of a process that may run on other CPUs than these."""
    wanted = set(cpus)
    found = []
    for status in Path(f"/proc/{process}/task").glob("*/status"):
        for line in _read(status).splitlines():
            if line.startswith("Cpus_allowed_list:") and not set(parse_list(line.split(":", 1)[1])) <= wanted:
                found.append(int(status.parent.name))
    return sorted(found)


def bytes_by_node(process: int | str = "self", anonymous_only: bool = True) -> dict[int, int]:
    """Bytes of a process's memory on each node, from its numa_maps. Empty where the kernel has none."""
    found: dict[int, int] = {}
    for line in _read(Path(f"/proc/{process}/numa_maps")).splitlines():
        fields = line.split()
        if anonymous_only and not any(item.startswith("anon=") for item in fields):
            continue
        size = next((int(item.split("=")[1]) for item in fields if item.startswith("kernelpagesize_kB=")), 4)
        for item in fields:
            if match := re.fullmatch(r"N(\d+)=(\d+)", item):
                found[int(match[1])] = found.get(int(match[1]), 0) + int(match[2]) * size * 1024
    return found


def local_ratio(node: int, process: int | str = "self") -> float | None:
    """Share of a process's anonymous memory that lies on a node; None where nobody knows."""
    found = bytes_by_node(process)
    total = sum(found.values())
    return found.get(node, 0) / total if total else None
