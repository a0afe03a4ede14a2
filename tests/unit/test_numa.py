"""Topologies and plans of machines that are not here, and binding on the one that is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.placement import numa
from cluster.placement.binding import Binding, numa_attributes
from cluster.placement.numa import Topology, format_list, parse_list, read_topology
from cluster.placement.seats import Seat, plan_seats
from tests.sysfs import CONTAINER, EPYC_NPS4, GIB, LAPTOP, ODD_NODES, TWO_SOCKETS_8_GPUS, Machine, build, cores


def seats(topology: Topology, groups: int) -> dict[str, Seat]:
    return {seat.role: seat for seat in plan_seats(topology, groups).seats}


def test_a_laptop_is_left_alone(tmp_path: Path) -> None:
    topology = read_topology(build(LAPTOP, tmp_path))
    assert [core.cpus for core in topology.cores] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert topology.nodes[0].memory_bytes == 16 * GIB
    plan = plan_seats(topology, 2)
    assert not plan.bind
    assert {seat.cpus for seat in plan.seats} == {tuple(range(8))}
    assert {seat.threads for seat in plan.seats} == {4}
    assert any("nothing is bound" in note for note in plan.notes)


def test_on_a_server_with_gpus_every_process_sits_beside_its_own(tmp_path: Path) -> None:
    topology = read_topology(build(TWO_SOCKETS_8_GPUS, tmp_path))
    assert [gpu.node for gpu in topology.gpus] == [0, 0, 0, 0, 1, 1, 1, 1]
    plan = plan_seats(topology, 7)
    assert plan.bind
    by_gpu = {seat.gpu: seat for seat in plan.seats}
    assert len(by_gpu) == 8
    for gpu in topology.gpus:
        assert by_gpu[gpu.pci].node == by_gpu[gpu.pci].memory_node == gpu.node
        assert by_gpu[gpu.pci].threads == 8
        assert not by_gpu[gpu.pci].shared
    taken = [cpu for seat in plan.seats for cpu in seat.cpus]
    assert sorted(taken) == list(range(128)), "all of it, nothing twice"
    assert by_gpu["0000:17:00.0"].cpus == tuple(cpu for i in range(8) for cpu in (i, 64 + i)), "with both threads"
    # The router has the first GPU, the first group its neighbour on the switch, and the other socket comes last.
    order = [seat.gpu for seat in plan.seats]
    assert order[:2] == ["0000:17:00.0", "0000:18:00.0"]
    assert [by_gpu[pci].node for pci in order] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_distances_of_gpus_are_those_of_the_bridges(tmp_path: Path) -> None:
    gpus = read_topology(build(TWO_SOCKETS_8_GPUS, tmp_path)).gpus
    assert numa.gpu_distance(gpus[0], gpus[1]) == "switch"
    assert numa.gpu_distance(gpus[0], gpus[2]) == "node"
    assert numa.gpu_distance(gpus[0], gpus[4]) == "remote"


def test_fewer_gpus_than_processes_is_said(tmp_path: Path) -> None:
    plan = plan_seats(read_topology(build(TWO_SOCKETS_8_GPUS, tmp_path)), 8)
    assert all(seat.gpu is None for seat in plan.seats)
    assert any("8 GPUs for 9 processes" in note for note in plan.notes)


def test_groups_are_spread_over_the_nodes_of_a_package_that_has_several(tmp_path: Path) -> None:
    topology = read_topology(build(EPYC_NPS4, tmp_path))
    plan = plan_seats(topology, 7)
    assert [seat.node for seat in plan.seats] == list(range(8))
    assert all(len(seat.cpus) == 8 for seat in plan.seats)
    assert any("sub-NUMA" in note for note in plan.notes)
    crowded = seats(topology, 15)
    assert crowded["router"].cpus + crowded["group-7"].cpus == tuple(range(8))


def test_a_container_uses_what_it_may(tmp_path: Path) -> None:
    topology = read_topology(build(CONTAINER, tmp_path))
    assert [core.cpus for core in topology.cores] == [(2, 66), (3,), (32, 96), (33,)]
    assert topology.quota_cpus == 4
    found = seats(topology, 3)
    assert sorted(cpu for seat in found.values() for cpu in seat.cpus) == [2, 3, 32, 33, 66, 96]
    assert {seat.threads for seat in found.values()} == {1}


def test_nodes_without_memory_or_cpus_and_cpus_that_are_off(tmp_path: Path) -> None:
    topology = read_topology(build(ODD_NODES, tmp_path))
    assert [cpu for core in topology.cores for cpu in core.cpus] == [0, 2, 3, 4, 5, 7]
    assert topology.nearest_memory(1) == 0
    found = seats(topology, 1)
    assert (found["router"].node, found["router"].memory_node) == (0, 0)
    assert (found["group-0"].node, found["group-0"].memory_node) == (1, 0)
    notes = plan_seats(topology, 1).notes
    assert any("without memory: 1" in note for note in notes)
    assert any("without usable CPUs: 2" in note for note in notes)


def test_a_gpu_whose_node_nobody_tells_is_not_bound(tmp_path: Path) -> None:
    gpus = {f"0000:0{i}:00.0": (-1, "pci0000:00") for i in range(1, 4)}
    machine = Machine([cores(0, 4), cores(4, 4)], [8, 8], [0, 1], gpus=gpus)
    plan = plan_seats(read_topology(build(machine, tmp_path)), 2)
    assert all(seat.node == -1 and seat.cpus == () for seat in plan.seats)
    assert any("does not tell" in note for note in plan.notes)


def test_a_kernel_without_numa_is_one_node(tmp_path: Path) -> None:
    (tmp_path / "devices/system/cpu").mkdir(parents=True)
    (tmp_path / "devices/system/cpu/online").write_text("0-3\n")
    topology = read_topology(tmp_path)
    assert [node.cpus for node in topology.nodes] == [(0, 1, 2, 3)]
    assert len(topology.cores) == 4
    assert not plan_seats(topology, 2).bind


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 20), st.booleans())
def test_plans_never_take_a_core_twice_unless_they_say_so(sizes: list[int], groups: int, smt: bool) -> None:
    found, first, total = [], 0, sum(sizes)
    if not total:
        return
    from cluster.placement.numa import Core, Node

    nodes = []
    for number, size in enumerate(sizes):
        mine = cores(first, size, total + first if smt else None)
        found += [Core(core, number, number) for core in mine]
        nodes.append(Node(number, tuple(cpu for core in mine for cpu in core), GIB, {}))
        first += size
    plan = plan_seats(Topology(tuple(nodes), tuple(found)), groups)
    assert len(plan.seats) == groups + 1
    assert all(seat.threads >= 1 and seat.cpus for seat in plan.seats)
    taken = [cpu for seat in plan.seats if not seat.shared for cpu in seat.cpus]
    assert len(taken) == len(set(taken))
    whole = {core.cpus for core in found}
    for seat in plan.seats:
        assert all(set(core) <= set(seat.cpus) or not set(core) & set(seat.cpus) for core in whole), "whole cores only"


@given(st.sets(st.integers(0, 300)))
def test_lists_of_numbers_are_the_kernels(numbers: set[int]) -> None:
    assert parse_list(format_list(numbers)) == sorted(numbers)


def test_this_machine_is_read_bound_and_read_back() -> None:
    topology = read_topology()
    allowed = os.sched_getaffinity(0)
    assert {cpu for core in topology.cores for cpu in core.cpus} <= allowed
    home = topology.cores[0].node
    try:
        numa.set_memory_policy([home], strict=True)
        assert numa.memory_policy() == (numa.MPOL_BIND, [home])
        numa.set_memory_policy([])
        assert numa.memory_policy()[0] == numa.MPOL_DEFAULT
    except numa.NumaError as exc:
        pytest.skip(f"the kernel here lets nobody set memory policies: {exc}")
    assert numa.bind_threads(allowed) >= 1
    assert numa.threads_elsewhere(allowed) == []
    ratio = numa.local_ratio(home)
    if ratio is not None and len(topology.nodes) == 1:
        assert ratio == 1.0


def test_what_the_kernel_refuses_is_said() -> None:
    with pytest.raises(numa.NumaError, match="set"):
        numa.set_memory_policy([1000], strict=True)


class Kernel:
    """Stands in for the system calls; remembers what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, local: float = 1.0, elsewhere: int = 0) -> None:
        self.policies: list[tuple[list[int], bool]] = []
        self.cpus: list[tuple[int, ...]] = []
        monkeypatch.setattr(numa, "set_memory_policy", lambda nodes, strict: self.policies.append((nodes, strict)))
        monkeypatch.setattr(numa, "bind_threads", lambda cpus: self.cpus.append(tuple(cpus)) or 3)
        monkeypatch.setattr(numa, "local_ratio", lambda node: local)
        monkeypatch.setattr(numa, "threads_elsewhere", lambda cpus: [7] * elsewhere)


def test_a_process_takes_its_seat_and_tells_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = read_topology(build(EPYC_NPS4, tmp_path))
    kernel = Kernel(monkeypatch, local=0.98)
    binding = Binding("auto", "group-2", 7, topology=topology)
    assert kernel.policies == [([3], False)]
    assert kernel.cpus == [tuple(range(24, 32))]
    assert binding.threads(otherwise=1) == 8
    binding.check()
    where = binding.where()
    assert (where.node, where.cpus, where.local_ratio) == (3, "24-31", 0.98)
    assert numa_attributes(binding) == {"moe.numa.node": 3}


def test_beside_its_gpu_whichever_ray_gave_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = read_topology(build(TWO_SOCKETS_8_GPUS, tmp_path))
    kernel = Kernel(monkeypatch)
    binding = Binding("strict", "group-0", 2, gpu="0000:98:00.0", hosts=4, topology=topology)
    assert kernel.policies == [([1], True)]
    assert binding.seat is not None
    assert set(binding.seat.cpus) == {*range(40, 48), *range(104, 112)}


def test_on_several_machines_a_group_takes_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    Binding("auto", "group-8", 20, hosts=5, topology=read_topology(build(EPYC_NPS4, tmp_path)))
    assert kernel.cpus == [tuple(range(8, 16))]


def test_strict_fails_where_memory_or_threads_are_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    topology = read_topology(build(EPYC_NPS4, tmp_path))
    for local, elsewhere, words in ((0.5, 0, "50% of the memory"), (1.0, 2, "2 threads")):
        Kernel(monkeypatch, local, elsewhere)
        binding = Binding("strict", "router", 3, topology=topology)
        with pytest.raises(ConfigError, match=words):
            binding.check()
        Binding("auto", "router", 3, topology=topology).check()


def test_a_kernel_that_refuses_ends_strict_and_leaves_auto_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = read_topology(build(EPYC_NPS4, tmp_path))

    def refuse(nodes: object, strict: bool) -> None:
        raise numa.NumaError(1, "planted")

    monkeypatch.setattr(numa, "set_memory_policy", refuse)
    binding = Binding("auto", "router", 3, topology=topology)
    assert binding.seat is None
    assert "planted" in binding.where().note
    with pytest.raises(ConfigError, match="strict"):
        Binding("strict", "router", 3, topology=topology)


def test_one_node_or_off_binds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    topology = read_topology(build(LAPTOP, tmp_path))
    for mode in ("auto", "strict", "off"):
        binding = Binding(mode, "router", 2, topology=topology)
        binding.check()
        assert binding.threads(otherwise=5) == 5
        assert binding.where().local_ratio == (None if mode == "off" else 1.0)
        assert numa_attributes(binding) == {}
    assert kernel.cpus == []
