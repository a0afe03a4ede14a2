"""How many processes share GPUs. Pure functions; Ray books, and counts in ten-thousandths."""

from __future__ import annotations

import math


def processes_each(share: float) -> int:
    """Of those that book ``share`` of a GPU, how many fit on one: none has parts of two."""
    return 10_000 // max(1, round(share * 1e4))


def has_room(gpus: float, free: float, share: float) -> bool:
    """One more fits on the cluster's ``gpus``, of which ``free`` are not booked, in however many pieces."""
    if share <= 0:
        return True
    there = math.ceil(round((gpus - free) / share, 4))
    return there < processes_each(share) * int(gpus)
