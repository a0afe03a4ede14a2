"""The shape of a plan: how many slots, groups and hosts there are, and which slot is where. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import InvalidArgument

Loads = np.ndarray[Any, np.dtype[np.float64]]
"""Tokens of each logical expert, [L, E]."""
Slots = np.ndarray[Any, np.dtype[np.int64]]
"""The logical expert in each physical slot, [L, S]; slots of a group are adjacent, and so are groups of a host. In a
plan that is to be changed -1 is an empty slot."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``slots`` physical experts of each layer over ``groups``, which are spread evenly over ``hosts``."""

    experts: int
    slots: int
    groups: int
    hosts: int

    def __post_init__(self) -> None:
        for name, value in (("--groups", self.groups), ("--hosts", self.hosts)):
            if value < 1:
                raise InvalidArgument(name, value, "must be at least 1")
        if self.slots < self.experts:
            raise InvalidArgument("--slots", self.slots, f"must be at least the {self.experts} experts of a layer")
        if self.slots % self.groups:
            raise InvalidArgument("--slots", self.slots, f"must be a multiple of --groups ({self.groups})")
        if self.groups % self.hosts:
            raise InvalidArgument("--hosts", self.hosts, f"must divide --groups ({self.groups})")

    @property
    def slots_each(self) -> int:
        """Slots of a group, in each layer."""
        return self.slots // self.groups

    def group_of_slot(self) -> Slots:
        """The group of each slot, [S]."""
        return np.arange(self.slots) // self.slots_each

    def host_of_group(self) -> Slots:
        """The host of each group, [G]."""
        return np.arange(self.groups) * self.hosts // self.groups


def slot_loads(loads_LE: Loads, slots_LS: Slots) -> Loads:
    """Tokens of each slot, [L, S], if an expert's copies share its tokens evenly."""
    copies_LE = count_copies(slots_LS, loads_LE.shape[1])
    layers = np.arange(len(slots_LS))[:, None]
    each_LE = loads_LE / np.maximum(copies_LE, 1)
    found: Loads = np.where(slots_LS >= 0, each_LE[layers, slots_LS], 0.0)
    return found


def count_copies(slots_LS: Slots, experts: int) -> Slots:
    """Copies of each logical expert, [L, E]."""
    copies_LE = np.zeros((len(slots_LS), experts), np.int64)
    layer_X, slot_X = np.nonzero(slots_LS >= 0)
    np.add.at(copies_LE, (layer_X, slots_LS[layer_X, slot_X]), 1)
    return copies_LE
