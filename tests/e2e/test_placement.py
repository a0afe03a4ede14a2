"""Groups come and go under load, through Ray: nobody else's process changes, and every answer is right."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.api.client import Client
from cluster.bench.reference import Reference
from cluster.config import EMBEDDED_MODEL
from cluster.errors import ExpertMeshError
from cluster.rpc.v1 import control_pb2
from cluster.rpc.v1 import inference_pb2 as pb
from tests.e2e.processes import ServeProcess, last_json, run

SOON = 60.0


class Load:
    """One stream after the other of a known answer, first to one router, for as long as the block lasts."""

    def __init__(self, addresses: list[str], prompt: list[int], known: list[int]) -> None:
        self._addresses, self._prompt, self._known = addresses, prompt, known
        self._stop = threading.Event()
        self.right, self.wrong = 0, list[Any]()
        self.resumed = 0
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with Client(",".join(self._addresses), timeout_s=SOON) as client:
            request = pb.GenerateRequest(
                prompt_ids=pb.TokenIds(ids=self._prompt), max_new_tokens=len(self._known), ignore_eos=True
            )
            while not self._stop.is_set():
                try:
                    got = [token.id for chunk in client.generate(request) for token in chunk.tokens]
                except ExpertMeshError as exc:
                    self.wrong.append(exc)
                    continue
                if got == self._known:
                    self.right += 1
                else:
                    self.wrong.append(got)
            self.resumed = client.resumed

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join(2 * SOON)


def pids(status: control_pb2.StatusReply) -> dict[int, int]:
    return {group.group: group.process.pid for group in status.groups}


def held(status: control_pb2.StatusReply) -> dict[int, list[list[int]]]:
    return {group.group: [list(layer.experts) for layer in group.holdings] for group in status.groups}


def until(what: Any, limit_s: float = SOON) -> Any:
    limit = time.monotonic() + limit_s
    while True:
        try:
            found = what()
        except ExpertMeshError:
            found = None
        if found:
            return found
        assert time.monotonic() < limit, "it did not come to pass in time"
        time.sleep(0.3)


def test_groups_and_routers_come_and_go_and_every_answer_is_right(tmp_path: Path) -> None:
    served = ServeProcess("--groups", "2", "--copies", "2", "--routers", "2", "--dtype", "fp32", log=tmp_path / "log")
    try:
        host, port = served.address.split(":")
        first, second = served.address, f"{host}:{int(port) + 1}"
        reference = Reference(EMBEDDED_MODEL, torch.float32)
        prompt = [5, 77, 300, 41]
        known = reference.greedy(prompt, 40)
        with Client(f"{second},{first}", timeout_s=SOON) as client:
            before = client.status()
            routers = {router.address: router.pid for router in until(lambda: client.placement().routers)}
            assert sorted(routers) == sorted([first, second])
            with Load([first, second], prompt, known) as here, Load([second, first], prompt, known) as there:
                done = run("scale", "--groups", "3", "--server", second, "--json")
                assert done.returncode == 0, done.stderr
                assert last_json(done)["groups"] == [0, 1, 2]
                grown = until(lambda: s if _sizes(s := client.status()) == {11} else None)
                assert {g: pid for g, pid in pids(grown).items() if g < 2} == pids(before)
                assert psutil.pid_exists(routers[first])

                # The coordinator dies; the next one knows what was changed.
                coordinator = _coordinator_of(served)
                os.kill(coordinator, signal.SIGKILL)
                os.kill(pids(grown)[2], signal.SIGKILL)
                back = until(lambda: s if pids(s := client.status()).get(2) not in (None, pids(grown)[2]) else None)
                assert held(back) == held(grown), "it came back with what it should hold now"

                os.kill(routers[first], signal.SIGKILL)
                time.sleep(2)
            assert here.wrong == there.wrong == []
            assert here.right + there.right > 4
            assert here.resumed == 1
            assert there.resumed == 0
    finally:
        status, left = served.stop()
    assert status == 0
    assert not left


@pytest.mark.full
def test_a_group_is_drained_and_others_are_stopped_under_load(tmp_path: Path) -> None:
    served = ServeProcess("--groups", "3", "--copies", "2", "--dtype", "fp32", log=tmp_path / "log")
    try:
        prompt = [5, 77, 300, 41]
        known = Reference(EMBEDDED_MODEL, torch.float32).greedy(prompt, 40)
        second = served.address
        with Client(second, timeout_s=SOON) as client:
            before = client.status()
            done = run("drain", "0", "--server", second, "--json")
            assert done.returncode == 0, done.stderr
            drained = until(lambda: s if not any(held(s := client.status())[0]) else None)
            assert pids(drained)[1] == pids(before)[1]
            with Load([second], prompt, known) as alone:
                time.sleep(1)
            assert alone.wrong == []
            done = run("scale", "--groups", "1", "--server", second, "--json")
            assert last_json(done)["groups"] == [1]
            done = run("status", "--rebalances", "--server", second)
            assert "drained groups: 0" in done.stdout
    finally:
        status, left = served.stop()
    assert status == 0
    assert not left


def _sizes(status: control_pb2.StatusReply) -> set[int]:
    """Two copies of 16 experts over three groups are 11 a layer, when all of the old ones are gone."""
    return {len(experts) for layers in held(status).values() for experts in layers}


def _coordinator_of(served: ServeProcess) -> int:
    found = [
        process.pid
        for process in psutil.Process(served.process.pid).children(recursive=True)
        if "expertmesh:coordinator" in " ".join(process.cmdline())
    ]
    if len(found) != 1:
        pytest.fail(f"{len(found)} coordinators")
    return found[0]
