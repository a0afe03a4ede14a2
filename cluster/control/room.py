"""Whether hosts have room for what groups should hold. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.core import GroupId, GroupInfo
from cluster.errors import Overloaded
from cluster.placement.planner import Holdings

SPARED = 0.1
"""Of what is free, that is left free."""
_GIB = 1024**3


def check_room(infos: Mapping[GroupId, GroupInfo], target: Mapping[GroupId, Holdings]) -> None:
    """What groups would have to load must fit into the free memory of their hosts (or of their GPUs), and a new group's
    into that of some host. Groups with a store load into the memory that they have.

    Raises:
        Overloaded: it does not.
    """
    free: dict[str, float] = {}
    for info in infos.values():
        if info.free_bytes:
            where = _where(info)
            free[where] = min(free.get(where, float("inf")), info.free_bytes * (1.0 - SPARED))
    known = next((info for info in infos.values() if info.expert_sizes), None)
    if known is None or not free:
        return
    for group, holdings in target.items():
        there = infos.get(group)
        if there is not None and (there.store is not None or not there.free_bytes):
            continue
        held = there.holdings if there is not None else ((),) * len(holdings)
        added = sum(
            size * len(set(wanted) - set(has))
            for size, wanted, has in zip(known.expert_sizes, holdings, held, strict=True)
        )
        needed = added * _layouts(there if there is not None else known)
        where = _where(there) if there is not None else max(free, key=lambda host: free[host])
        if needed > free[where]:
            raise Overloaded(
                f"group {group} would load {needed / _GIB:.2f} GiB of experts, and {where} has "
                f"{max(0.0, free[where]) / _GIB:.2f} GiB to spare; use more groups, fewer copies, or a budget "
                "(expert_memory)"
            )
        free[where] -= needed


def _where(info: GroupInfo) -> str:
    return info.host if info.device == "cpu" else f"the GPU of group {info.group}"


def _layouts(info: GroupInfo) -> float:
    """Bytes in memory for a byte of experts: more than one where weights have a second layout."""
    held = sum(size * len(experts) for size, experts in zip(info.expert_sizes, info.holdings, strict=True))
    return max(1.0, info.expert_bytes / held) if held else 1.0
