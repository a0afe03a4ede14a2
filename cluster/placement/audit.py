"""What a plan is worth: how even it is on some loads, what it takes to get there, and what dies with each host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.core import ExpertId
from cluster.placement.shape import Loads, Shape, Slots, slot_loads


@dataclass(frozen=True, slots=True)
class HostLoss:
    """If ``host`` dies: experts that no other host holds, and the share of all tokens that want one of them (tokens
    are counted once for each expert they want)."""

    host: int
    groups: tuple[int, ...]
    experts: tuple[ExpertId, ...]
    share: float


def balancedness_per_group(loads_LE: Loads, slots_LS: Slots, shape: Shape) -> list[float]:
    """Mean over maximum of the groups' tokens, by layer; 1 is even. A layer that nobody asked for is."""
    groups_LG = slot_loads(loads_LE, slots_LS).reshape(len(slots_LS), shape.groups, -1).sum(-1)
    return _mean_over_max(groups_LG)


def balancedness_per_slot(loads_LE: Loads, slots_LS: Slots) -> list[float]:
    """Mean over maximum of the slots' tokens, by layer."""
    return _mean_over_max(slot_loads(loads_LE, slots_LS))


def _mean_over_max(loads_LX: Loads) -> list[float]:
    most_L = loads_LX.max(-1)
    even: list[float] = np.where(most_L > 0, loads_LX.mean(-1) / np.maximum(most_L, 1e-300), 1.0).tolist()
    return even


def moves(current_LS: Slots | None, slots_LS: Slots, shape: Shape) -> list[int]:
    """Copies that groups have to load, by layer: those that they do not have by the current plan. Slots within a group
    are alike."""
    new_LGE = _held(slots_LS, shape)
    old_LGE = np.zeros_like(new_LGE) if current_LS is None else _held(current_LS, shape)
    loads: list[int] = (new_LGE & ~old_LGE).sum((1, 2)).tolist()
    return loads


def _held(slots_LS: Slots, shape: Shape) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    held_LGE = np.zeros((len(slots_LS), shape.groups, shape.experts), bool)
    held_LGE[np.arange(len(slots_LS))[:, None], shape.group_of_slot()[None, :], slots_LS] = True
    return held_LGE


def coverage(loads_LE: Loads, slots_LS: Slots, shape: Shape) -> list[HostLoss]:
    """What each host's death takes with it."""
    held_LGE = _held(slots_LS, shape)
    hosts_LHE = held_LGE.reshape(len(slots_LS), shape.hosts, -1, shape.experts).any(2)
    only_LHE = hosts_LHE & (hosts_LHE.sum(1, keepdims=True) == 1)
    total = float(loads_LE.sum())
    each = shape.groups // shape.hosts
    found = []
    for host in range(shape.hosts):
        layers, experts = np.nonzero(only_LHE[:, host])
        share = float(loads_LE[layers, experts].sum()) / total if total else 0.0
        lost = tuple(ExpertId(layer, expert) for layer, expert in zip(layers.tolist(), experts.tolist(), strict=True))
        found.append(HostLoss(host, tuple(range(host * each, (host + 1) * each)), lost, share))
    return found
