"""Holdings of groups as slots, which planners work on, and back; and the next plan for a set of groups. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.core import GroupId
from cluster.errors import InvalidArgument
from cluster.placement.planner import Holdings
from cluster.placement.shape import Loads, Shape, Slots, slot_loads
from cluster.placement.survivable import Hysteresis, survivable

NOWHERE = "?"


def slots_from_holdings(held: Sequence[Sequence[Sequence[int]]], slots_each: int) -> Slots:
    """``held[group][layer]`` are experts; [L, S] with -1 for empty slots."""
    layers = len(held[0]) if held else 0
    slots_LS = np.full((layers, slots_each * len(held)), -1, np.int64)
    for group, holdings in enumerate(held):
        for layer, experts in enumerate(holdings):
            slots_LS[layer, group * slots_each : group * slots_each + len(experts)] = experts
    return slots_LS


def holdings_from_slots(slots_LS: Slots, groups: int) -> list[Holdings]:
    """Per group, per layer, the sorted experts of its slots."""
    each = slots_LS.shape[1] // groups
    return [
        tuple(tuple(sorted({int(e) for e in layer[group * each : (group + 1) * each] if e >= 0})) for layer in slots_LS)
        for group in range(groups)
    ]


def in_order(groups: Sequence[GroupId], host_of: Mapping[GroupId, str]) -> tuple[list[GroupId], int]:
    """The groups, those of a host adjacent, and the number of failure domains: hosts where there are several with
    equally many groups, else every group is one."""
    ordered = sorted(groups, key=lambda group: (host_of.get(group, NOWHERE), group))
    counts: dict[str, int] = {}
    for group in groups:
        host = host_of.get(group, NOWHERE)
        counts[host] = counts.get(host, 0) + 1
    even = len(counts) > 1 and len(set(counts.values())) == 1 and NOWHERE not in counts
    return ordered, len(counts) if even else len(groups)


def replan(
    loads_LE: Loads,
    experts_per_layer: Sequence[int],
    current: Mapping[GroupId, Holdings],
    groups: Sequence[GroupId],
    host_of: Mapping[GroupId, str],
    copies: int = 1,
) -> dict[GroupId, Holdings]:
    """What each of ``groups`` should hold, with few moves from ``current``: ``copies`` of each expert, as far as there
    are groups, and altogether as many as there are now.

    A group takes what the fullest one has now; where the groups are others than before, or some are empty, an even
    share of all copies.

    Raises:
        InvalidArgument: fewer groups than one.
    """
    if not groups:
        raise InvalidArgument("groups", 0, "must be at least 1")
    ordered, domains = in_order(groups, host_of)
    same = sorted(current) == sorted(groups) and all(any(holdings) for holdings in current.values())
    found: dict[GroupId, list[tuple[int, ...]]] = {group: [()] * len(experts_per_layer) for group in groups}
    for experts in sorted(set(experts_per_layer)):  # layers of one width are planned together
        layers = [layer for layer, count in enumerate(experts_per_layer) if count == experts]
        held = [[len(holdings[layer]) for layer in layers] for holdings in current.values()]
        have = max((sum(of_layer) for of_layer in zip(*held, strict=True)), default=experts)
        least = max(experts, min(max(have, copies * experts), experts * len(groups)))
        each = -(-least // len(groups))
        if same:
            each = max(each, max(max(of_group) for of_group in held))
        shape = Shape(experts, each * len(groups), len(groups), domains)
        now = [[current[g][layer] if g in current else () for layer in layers] for g in ordered]
        now_LS = slots_from_holdings([[held[:each] for held in of_group] for of_group in now], each)
        # Of other groups than before, the plan that is there lacks copies: how well it is balanced says nothing.
        hysteresis = Hysteresis() if same else Hysteresis(plan=-1.0)
        planned = holdings_from_slots(survivable(loads_LE[layers, :experts], shape, now_LS, hysteresis), len(groups))
        for group, holdings in zip(ordered, planned, strict=True):
            for layer, wanted in zip(layers, holdings, strict=True):
                found[group][layer] = wanted
    return {group: tuple(holdings) for group, holdings in found.items()}


def balancedness(loads_LE: Loads, held: Mapping[GroupId, Holdings]) -> float:
    """Mean over maximum of the groups' loads if copies share theirs evenly: the mean of all layers; 1 is even."""
    if not held:
        return 1.0
    each = max(1, max(len(experts) for holdings in held.values() for experts in holdings))
    slots_LS = slots_from_holdings([held[group] for group in sorted(held)], each)
    groups_LG = slot_loads(loads_LE, slots_LS).reshape(len(slots_LS), len(held), -1).sum(-1)
    most_L = groups_LG.max(-1)
    return float(np.where(most_L > 0, groups_LG.mean(-1) / np.maximum(most_L, 1e-300), 1.0).mean())


def plan_as_text(plan: Mapping[GroupId, Holdings]) -> str:
    """For keeping."""
    return json.dumps({str(group): holdings for group, holdings in plan.items()})


def plan_from_text(text: str, layers: int) -> dict[GroupId, Holdings] | None:
    """What `plan_as_text` made; None where it is of something else."""
    try:
        plan = {int(g): tuple(tuple(map(int, experts)) for experts in held) for g, held in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError):
        return None
    return plan if plan and all(len(held) == layers for held in plan.values()) else None
