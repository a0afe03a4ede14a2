"""Whom a layer waited for: the router's waiting, split into parts that neither overlap nor leave anything out.

The router's thread sends its calls, then takes the answers one after another and waits where one is not there yet. What
it waited is known from its own clock; the groups' clocks only say how to divide it. Until the first answer came, that
group's own account counts: computing, loading, queueing, and the rest is the wire. From the first answer to the last,
everybody but the last group was done: that time is the straggler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cluster.telemetry.ledger import Ledger, Stage


class Answer(NamedTuple):
    """One group's answer: when it came, what the group says of it, and when the router's thread waited for it.

    ``failed``: the call had to be sent again, so that all of the waiting is the failure's.
    """

    group: int
    answered_s: float
    wait_from_s: float
    wait_until_s: float
    queue_s: float = 0.0
    compute_s: float = 0.0
    load_s: float = 0.0
    failed: bool = False


def account(ledger: Ledger, layer: int, answers: Sequence[Answer]) -> None:
    """Books the waiting of one layer: exactly the sum of the answers' intervals, which must not overlap."""
    first: Answer | None = None
    last: Answer | None = None
    for answer in answers:
        if answer.failed:
            ledger.wait(answer.group, layer, Stage.FAILOVER, answer.wait_until_s - answer.wait_from_s)
            continue
        if first is None or answer.answered_s < first.answered_s:
            first = answer
        if last is None or answer.answered_s >= last.answered_s:
            last = answer
    if first is None or last is None:
        return
    before_s = between_s = after_s = 0.0
    for answer in answers:
        if answer.failed:
            continue
        start_s, end_s = answer.wait_from_s, answer.wait_until_s
        before_s += max(0.0, min(end_s, first.answered_s) - start_s)
        between_s += max(0.0, min(end_s, last.answered_s) - max(start_s, first.answered_s))
        after_s += max(0.0, end_s - max(start_s, last.answered_s))
    # What passed before anybody waited was hidden; the wire counts as hidden first.
    for stage, said_s in (
        (Stage.GROUP_COMPUTE, first.compute_s),
        (Stage.COLD_LOAD, first.load_s),
        (Stage.GROUP_QUEUE, first.queue_s),
    ):
        part_s = min(max(0.0, said_s), before_s)
        ledger.wait(first.group, layer, stage, part_s)
        before_s -= part_s
    ledger.wait(first.group, layer, Stage.WIRE, before_s)
    cold_s = min(max(0.0, last.load_s), between_s) if last is not first else 0.0
    ledger.wait(last.group, layer, Stage.COLD_LOAD, cold_s)
    ledger.wait(last.group, layer, Stage.STRAGGLER, between_s - cold_s)
    ledger.wait(last.group, layer, Stage.WIRE, after_s)  # until the waiting thread ran again
