"""What a router tells the coordinator each time that it asks for the placement table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RouterReport:
    """``router`` is new for each process. ``table`` is the order of the table in use: (epoch, version); copies that it
    names must stay. ``activations_LE`` and ``prefill_LE`` are `cluster.routing.loads.ExpertLoads` since its start, sent
    now and then; ``stepping_s`` are seconds of steps; ``gaps`` are `cluster.telemetry.gaps.GapCounts`."""

    router: str
    table: tuple[int, int]
    address: str = ""
    host: str = ""
    pid: int = 0
    live: int = 0
    stepping_s: float = 0.0
    draining: bool = False
    activations_LE: Any = None
    prefill_LE: Any = None
    gaps: Any = None
