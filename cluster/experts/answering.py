"""How a layer call is computed and answered, whoever's thread does it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from cluster.core import Clock, LayerCall, Order
from cluster.errors import ExpertMeshError, InternalError
from cluster.experts.loads import LoadNotes
from cluster.transport.base import LayerReply, LayerRows, PendingReply

log = logging.getLogger(__name__)

Compute = Callable[[int, LayerRows], torch.Tensor]
Observe = Callable[[LayerCall, float, float, LayerReply], None]
"""(call with a traceparent, when it was taken, when it was done by the monotonic clock, its reply)."""
OnOrder = Callable[[Order], None]
Lend = Callable[[], object]
"""Wakes a thread that a host may have for one call."""


def answer(
    compute: Compute,
    call: LayerCall,
    rows: LayerRows,
    pending: PendingReply,
    waited_s: float,
    clock: Clock,
    notes: LoadNotes,
    observe: Observe | None,
) -> bool:
    """Computes a call and sets its reply, or its error; whether it was a reply."""
    try:
        pending.resolve(reply_to(compute, call, rows, waited_s, clock, notes, observe))
    except ExpertMeshError as exc:
        pending.fail(exc)
        return False
    return True


def reply_to(
    compute: Compute,
    call: LayerCall,
    rows: LayerRows,
    waited_s: float,
    clock: Clock,
    notes: LoadNotes,
    observe: Observe | None,
) -> LayerReply:
    """Computes a call.

    Raises:
        ExpertMeshError: it could not be computed.
    """
    notes.reset()
    started_s = clock()
    try:
        partial_TH = compute(call.layer, rows)
    except ExpertMeshError:
        raise
    except Exception as exc:
        log.exception("layer %d failed", call.layer)
        raise InternalError(f"computing layer {call.layer} failed: {type(exc).__name__}") from exc
    load_s = notes.seconds
    ended_s = clock()
    reply = LayerReply(partial_TH, waited_s, ended_s - started_s - load_s, load_s, notes.expert, notes.num_bytes)
    if call.traceparent and observe is not None:
        observe(call, started_s, ended_s, reply)
    return reply
