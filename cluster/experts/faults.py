"""Faults planted by configuration (`faults.*`): a slow group, a cold expert, a link that drops. For seeing, in a trace
and in tests, what such a fault looks like before it comes by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from cluster.core import Clock, ExpertId, GroupId
from cluster.experts.loads import LoadNotes
from cluster.settings import FaultsConfig
from cluster.transport.base import LayerRows

Compute = Callable[[int, LayerRows], torch.Tensor]


def with_faults(
    compute: Compute,
    group: GroupId,
    faults: FaultsConfig,
    notes: LoadNotes,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Compute:
    """``compute`` itself, or in the group that the configuration names one that is slower."""
    if faults.group != group or not (faults.compute_ms or faults.cold_ms):
        return compute
    cold = ExpertId(*faults.cold_pair()) if faults.cold_expert else None
    next_cold_s = 0.0

    def slow(layer: int, rows: LayerRows) -> torch.Tensor:
        nonlocal next_cold_s
        if faults.compute_ms:
            sleep(faults.compute_ms / 1e3)
        due = cold is not None and layer == cold.layer and clock() >= next_cold_s
        if cold is not None and due and cold.expert in rows.pairs_3P[1]:
            started_s = clock()
            sleep(faults.cold_ms / 1e3)
            notes.add(cold.expert, clock() - started_s, 0)
            next_cold_s = clock() + faults.cold_every_s
        return compute(layer, rows)

    return slow


class LinkDropper:
    """Ends the links of a group again and again. ``drop`` is called every ``period_s`` seconds until `close`."""

    def __init__(self, drop: Callable[[], None], period_s: float) -> None:
        self._drop, self._period_s = drop, period_s
        self._stop = threading.Event()
        threading.Thread(target=self._run, name="fault-drop-links", daemon=True).start()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._drop()

    def close(self) -> None:
        """No more."""
        self._stop.set()
