"""What groups should hold, kept where it outlives all of them: in Ray's key-value store."""

from __future__ import annotations

import hashlib

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.config import Config
from cluster.core import GroupId
from cluster.placement.layout import plan_from_text
from cluster.placement.planner import Holdings

_PLAN_KEY = b"expertmesh:plan"


def basis_of(config: Config) -> str:
    """What a plan is good for: not for another model, number of groups or copies, or first plan than was asked for."""
    asked = (config.model, config.groups, config.copies, config.placement.plan)
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def keep_plan(plan: str, basis: str = "") -> None:
    """What groups should hold from now on, also those that start later; empty: what they are started with."""
    _internal_kv_put(_PLAN_KEY, f"{basis}\n{plan}".encode() if plan else b"", overwrite=True)


def kept_plan(layers: int, basis: str) -> dict[GroupId, Holdings] | None:
    """What `keep_plan` was last told; None where nothing is kept for this basis and a model of so many MoE layers."""
    raw = _internal_kv_get(_PLAN_KEY)
    made_for, _, plan = raw.decode().partition("\n") if raw else ("", "", "")
    return plan_from_text(plan, layers) if plan and made_for == basis else None
