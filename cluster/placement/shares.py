"""How many processes share GPUs. Pure functions; Ray books, and counts in ten-thousandths."""

from __future__ import annotations

import math

from cluster.errors import ConfigError


def processes_each(share: float) -> int:
    """Of those that book ``share`` of a GPU, how many fit on one: none has parts of two."""
    return 10_000 // max(1, round(share * 1e4))


def check_room(gpus: int, routers: int, groups: int, share: float) -> None:
    """A cluster with so many GPUs has room for a share each.

    Raises:
        ConfigError: it has not; what would do.
    """
    each, need = processes_each(share), routers + groups
    if gpus * each >= need:
        return
    part = f"{share:g} of one" if share < 1 else "one"
    fitting = math.floor(1e4 / math.ceil(need / gpus)) / 1e4
    raise ConfigError(
        f"groups: {math.ceil(need / each)} GPUs are needed ({part} for each router and each group), the cluster has "
        f"{gpus}; use --groups {max(0, gpus * each - routers)}, --device cpu, or gpu_share {fitting:g} (several share "
        "one)"
    )


def has_room(gpus: float, free: float, share: float) -> bool:
    """One more fits on the cluster's ``gpus``, of which ``free`` are not booked, in however many pieces."""
    if share <= 0:
        return True
    there = math.ceil(round((gpus - free) / share, 4))
    return there < processes_each(share) * int(gpus)
