"""Binding on a kernel that really has two NUMA nodes. Not part of `make test`: `make test-numa`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import numa
from tests.vm.machine import find_emulator, find_kernel, run

MIB = 1024**2
MOST = 60 * MIB


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kernel, emulator = find_kernel(), find_emulator()
    if kernel is None or emulator is None:
        pytest.fail(
            "a kernel image (KERNEL=, or /boot/vmlinuz-*) and qemu-system-x86_64 are needed; Debian: "
            "apt install qemu-system-x86 linux-image-cloud-amd64"
        )
    product = [("product/numa.py", Path(numa.__file__))]
    console = run(kernel, emulator, Path(__file__).with_name("guest.py"), product, tmp_path_factory.mktemp("vm"))
    lines = [line.partition("RESULT ")[2] for line in console.splitlines() if "RESULT " in line]
    assert lines, console[-4000:]
    result: dict[str, Any] = json.loads(lines[-1])
    assert "error" not in result, result["error"]
    print(json.dumps(result, indent=1))
    return result


def test_the_topology_is_the_machines(told: dict[str, Any]) -> None:
    assert [node["cpus"] for node in told["nodes"]] == [[0, 1], [2, 3]]
    assert all(350 * MIB < node["memory_bytes"] <= 512 * MIB for node in told["nodes"])
    assert told["nodes"][0]["distances"] == {"0": 10, "1": 21}
    assert sorted(cpu for core in told["cores"] for cpu in core) == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", ["strict", "preferred"])
@pytest.mark.parametrize("node", [0, 1])
def test_a_bound_process_has_its_memory_and_all_its_threads_on_its_node(
    told: dict[str, Any], mode: str, node: int
) -> None:
    found = told[mode][node]
    assert "error" not in found, found
    assert found["new_bytes"][str(node)] >= MOST
    assert found["new_bytes"][str(1 - node)] <= MIB
    assert found["local_ratio"] > 0.8
    assert found["threads"] == 2
    assert found["elsewhere"] == []
    assert found["ran_on"] == ([0, 1] if node == 0 else [2, 3])
    assert found["policy"] == [numa.MPOL_BIND if mode == "strict" else numa.MPOL_PREFERRED, [node]]


def test_threads_inherit_the_policy_and_buffers_move(told: dict[str, Any]) -> None:
    assert told["inherited"]["1"] >= MOST
    assert told["inherited"]["0"] <= MIB
    assert told["moved"]["1"] >= MOST
    assert told["moved"]["0"] <= -MOST
