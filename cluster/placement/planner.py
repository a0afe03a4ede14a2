"""The static plan: every layer's experts in contiguous blocks, one a group. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cluster.core import GroupId, GroupInfo, PlacementTable
from cluster.errors import ConfigError

Holdings = tuple[tuple[int, ...], ...]


def plan_blocks(experts_per_layer: Sequence[int], num_groups: int) -> list[Holdings]:
    """Per group, per MoE layer, the logical experts it holds; block sizes differ by one at most.

    Raises:
        ConfigError: fewer than one group, or more groups than experts in some layer.
    """
    if num_groups < 1:
        raise ConfigError(f"groups: got {num_groups}; must be at least 1")
    if num_groups > min(experts_per_layer):
        raise ConfigError(
            f"groups: got {num_groups}; a layer of this model has {min(experts_per_layer)} experts, and a group must "
            "hold at least one of each layer"
        )
    return [
        tuple(tuple(range(n * group // num_groups, n * (group + 1) // num_groups)) for n in experts_per_layer)
        for group in range(num_groups)
    ]


def plan_copies(experts_per_layer: Sequence[int], num_groups: int, copies: int) -> list[Holdings]:
    """As `plan_blocks`, with each expert in ``copies`` groups: a block's further copies are dealt out to all other
    groups in turn, so that when one group is gone its load is everybody's.

    Raises:
        ConfigError: as `plan_blocks`; or more copies than groups.
    """
    blocks = plan_blocks(experts_per_layer, num_groups)
    if not 1 <= copies <= num_groups:
        raise ConfigError(f"copies: got {copies}; must be from 1 to the number of groups, {num_groups}")
    held = [[set(experts) for experts in holdings] for holdings in blocks]
    for group, holdings in enumerate(blocks):
        for layer, experts in enumerate(holdings):
            for place, expert in enumerate(experts):
                for copy in range(copies - 1):
                    step = (place + copy) % (num_groups - 1)
                    held[(group + 1 + step) % num_groups][layer].add(expert)
    return [tuple(tuple(sorted(experts)) for experts in holdings) for holdings in held]


def owners_from_holdings(
    experts_per_layer: Sequence[int], holdings: Mapping[GroupId, Sequence[Iterable[int]]]
) -> tuple[tuple[tuple[GroupId, ...], ...], ...]:
    """``owners[layer][expert]``: the groups that say they hold the expert, lowest id first."""
    owners: list[list[list[GroupId]]] = [[[] for _ in range(n)] for n in experts_per_layer]
    for group in sorted(holdings):
        for layer, experts in enumerate(holdings[group]):
            for expert in experts:
                owners[layer][expert].append(group)
    return tuple(tuple(tuple(groups) for groups in layer) for layer in owners)


def table_from_groups(
    epoch: int, version: int, experts_per_layer: Sequence[int], groups: Iterable[GroupInfo]
) -> PlacementTable:
    """The table that the living groups' own reports make."""
    holdings = {info.group: info.holdings for info in groups}
    return PlacementTable(epoch, version, owners_from_holdings(experts_per_layer, holdings))
