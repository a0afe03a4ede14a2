#!/usr/bin/env python3
"""The only process of a virtual machine with two NUMA nodes: binds children of itself and tells where their memory is.

Prints one JSON object behind the word RESULT, then switches the machine off. `numa.py` of the product lies beside it.
"""

import ctypes
import json
import mmap
import os
import sys
import threading
import traceback

sys.path.insert(0, "/product")

LIBC = ctypes.CDLL(None, use_errno=True)
SIZE = 64 * 1024 * 1024
POWER_OFF = 0x4321FEDC


def mount(kind, target):
    os.makedirs(target, exist_ok=True)
    LIBC.mount(kind.encode(), target.encode(), kind.encode(), 0, None)


def touch(number_of_bytes=SIZE):
    memory = mmap.mmap(-1, number_of_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, number_of_bytes, 4096):
        memory[offset] = 1
    return memory


def in_child(work):
    """What ``work`` returns, from a process of its own, so that nothing it sets stays."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = work()
        except BaseException:  # noqa: BLE001 - told to whoever reads the console
            result = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(result).encode())
        os._exit(0)
    os.close(writer)
    data = b""
    while chunk := os.read(reader, 65536):
        data += chunk
    os.waitpid(child, 0)
    return json.loads(data)


def bound(numa, topology, node, strict):
    def work():
        cpus = topology.node(node).cpus
        early = threading.Event()
        waiting = threading.Thread(target=early.wait)
        waiting.start()  # a thread that was there before, as under Ray
        threads = numa.bind_threads(cpus)
        numa.set_memory_policy([node], strict=strict)
        before = numa.bytes_by_node()
        kept = touch()
        after = numa.bytes_by_node()
        told = {
            "threads": threads,
            "elsewhere": numa.threads_elsewhere(cpus),
            "policy": numa.memory_policy(),
            "ran_on": sorted(os.sched_getaffinity(0)),
            "new_bytes": {str(n): after.get(n, 0) - before.get(n, 0) for n in (0, 1)},
            "local_ratio": numa.local_ratio(node),
        }
        early.set()
        waiting.join()
        kept.close()
        return told

    return in_child(work)


def inherited(numa, topology):
    """A thread that starts after the policy was set allocates by it."""

    def work():
        numa.set_memory_policy([1], strict=True)
        before = numa.bytes_by_node()
        kept = []
        thread = threading.Thread(target=lambda: kept.append(touch()))
        thread.start()
        thread.join()
        after = numa.bytes_by_node()
        return {str(n): after.get(n, 0) - before.get(n, 0) for n in (0, 1)}

    return in_child(work)


def moved(numa):
    """A buffer that lies on node 0 moves to node 1."""

    def work():
        numa.set_memory_policy([0], strict=True)
        kept = touch()
        address = ctypes.addressof(ctypes.c_char.from_buffer(kept))
        before = numa.bytes_by_node()
        numa.bind_memory(address, SIZE, 1)
        after = numa.bytes_by_node()
        return {str(n): after.get(n, 0) - before.get(n, 0) for n in (0, 1)}

    return in_child(work)


def main():
    for kind, target in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")):
        mount(kind, target)
    import numa

    topology = numa.read_topology()
    return {
        "nodes": [
            {"node": n.node, "cpus": list(n.cpus), "memory_bytes": n.memory_bytes, "distances": dict(n.distances)}
            for n in topology.nodes
        ],
        "cores": [list(core.cpus) for core in topology.cores],
        "strict": [bound(numa, topology, node, strict=True) for node in (0, 1)],
        "preferred": [bound(numa, topology, node, strict=False) for node in (0, 1)],
        "inherited": inherited(numa, topology),
        "moved": moved(numa),
    }


try:
    answer = main()
except BaseException:  # noqa: BLE001 - as above
    answer = {"error": traceback.format_exc()}
print("RESULT", json.dumps(answer), flush=True)
os.sync()
LIBC.reboot(POWER_OFF)
