"""What groups should hold, kept where it outlives all of them: in Ray's key-value store."""

from __future__ import annotations

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.core import GroupId
from cluster.placement.layout import plan_from_text
from cluster.placement.planner import Holdings

_PLAN_KEY = b"expertmesh:plan"


def keep_plan(plan: str) -> None:
    """What groups should hold from now on, also those that start later; empty: what they are started with."""
    _internal_kv_put(_PLAN_KEY, plan.encode(), overwrite=True)


def kept_plan(layers: int) -> dict[GroupId, Holdings] | None:
    """What `keep_plan` was last told; None where nothing is kept for a model of so many MoE layers."""
    raw = _internal_kv_get(_PLAN_KEY)
    return plan_from_text(raw.decode(), layers) if raw else None
