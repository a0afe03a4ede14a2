"""A served embedded model over real links, whose traces go to a store: what tests of traces are built with."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.api.client import Client
from cluster.api.client_tracing import ClientTracer
from cluster.api.router import Router
from cluster.config import EMBEDDED_MODEL
from cluster.errors import Unavailable
from cluster.experts.group import ExpertGroup
from cluster.rpc.v1 import inference_pb2 as pb
from cluster.settings import TelemetryConfig
from cluster.telemetry.blame import Blamed, blame
from cluster.telemetry.records import RequestRecord
from cluster.telemetry.store import read_store
from cluster.telemetry.traces import TraceView, traces_of
from tests.door import Door
from tests.systems import linked_router

VOCAB = 256


class Traced:
    """A served embedded model whose traces go to a store."""

    def __init__(self, router: Router, groups: list[ExpertGroup], door: Door, store: Path) -> None:
        self.router, self.groups, self.door, self._store = router, groups, door, store
        self.tracer = ClientTracer(TelemetryConfig(traces="file", store=str(store)))
        self.records: list[RequestRecord] = []
        telemetry = router.telemetry
        assert telemetry is not None
        tell = telemetry.request

        def also(record: RequestRecord) -> None:
            self.records.append(record)
            tell(record)

        telemetry.request = also  # type: ignore[method-assign]

    def ask(self, prompt: int, new: int, pause_s: float = 0.0, tracer: bool = True, layers: bool = False) -> list[int]:
        ids = [random.randrange(3, VOCAB) for _ in range(prompt)]
        message = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=ids), max_new_tokens=new, ignore_eos=True)
        tokens: list[int] = []
        with Client(self.door.address, tracer=self.tracer if tracer else None) as client:
            for chunk in client.generate(message, trace_layers=layers):
                tokens += [token.id for token in chunk.tokens]
                if pause_s:
                    time.sleep(pause_s)
        return tokens

    def load(self, jobs: list[Callable[[], object]], streams: int) -> None:
        """Runs jobs, so many at a time."""
        waiting = jobs[::-1]

        def work() -> None:
            while True:
                try:
                    job = waiting.pop()
                except IndexError:
                    return
                job()

        threads = [threading.Thread(target=work) for _ in range(streams)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)

    def mixed(self, number: int) -> list[Callable[[], object]]:
        return [lambda: self.ask(random.randrange(6, 40), random.randrange(6, 20)) for _ in range(number)]

    @contextmanager
    def dead_link(self, after_s: float, for_s: float) -> Iterator[None]:
        """A while into the block, group 1 can be reached by nobody for some time."""
        host = self.groups[1].host
        submit = host.submit

        def refuse(_call: object, _rows: object, pending: Any) -> None:
            pending.fail(Unavailable("planted"))

        def fault() -> None:
            time.sleep(after_s)
            host.submit = refuse  # type: ignore[method-assign, assignment]
            self.groups[1].drop_links()
            time.sleep(for_s)
            host.submit = submit  # type: ignore[method-assign]

        planting = threading.Thread(target=fault)
        planting.start()
        yield
        planting.join(10)

    def traces(self) -> dict[str, TraceView]:
        telemetry = self.router.telemetry
        assert telemetry is not None
        assert telemetry.flush(10)
        for pump in self.tracer._pumps:
            assert pump.flush(10)
        return traces_of(read_store(self._store))

    def blamed(self, quantile: float) -> Blamed:
        report = blame([trace for trace in self.traces().values() if trace.request is not None], quantile)
        return report.causes[0]


@contextmanager
def traced(store: Path, transports: str = "shm", **flags: Any) -> Iterator[Traced]:
    telemetry = {"traces": "file", "store": str(store), "metrics_listen": "off", **flags.pop("telemetry", {})}
    with linked_router(EMBEDDED_MODEL, transports, 2, telemetry=telemetry, **flags) as (router, groups):
        door = Door()
        door.open(router)
        system = Traced(router, groups, door, store)
        try:
            yield system
        finally:
            system.tracer.close()
            door.close()
