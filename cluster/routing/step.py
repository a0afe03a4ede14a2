"""What travels beside the layer calls of one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.core import ExpertId, Priority
from cluster.telemetry.account import StepEvent
from cluster.telemetry.ledger import Ledger
from cluster.telemetry.steps import StepDetail


@dataclass(slots=True)
class StepContext:
    """One step. ``ledger`` may be one that many steps share; ``detail`` is there when somebody asked for every layer's
    times; ``missing`` are experts that were wanted and not computed, which only `degrade` allows."""

    step_id: int
    priority: Priority = Priority.DECODE
    ledger: Ledger = field(default_factory=Ledger)
    events: list[StepEvent] = field(default_factory=list)
    detail: StepDetail | None = None
    missing: list[ExpertId] = field(default_factory=list)
