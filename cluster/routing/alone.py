"""A decode step's layer whose experts are all in one group in this process: computed where it is called.

There is nobody to send anything to, to wait for, or to choose between, and what is made for that (a part, a reply to
wait for, a limit) took a tenth of a step where nothing else is left to do between two layers.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from cluster.core import Clock
from cluster.errors import ExpertMeshError, InternalError
from cluster.routing.caller import RETRIED, Caller
from cluster.routing.fabric import Fabric
from cluster.routing.split import Ints
from cluster.routing.step import StepContext
from cluster.telemetry.account import StepEvent
from cluster.telemetry.ledger import Stage
from cluster.transport.base import LayerReply, LayerRows
from cluster.transport.inproc import InprocTransport

log = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """Row of each pair, and the gate's experts and weights [T, K]."""

    rows_P: Ints
    index_TK: torch.Tensor
    weight_TK: torch.Tensor


class Computed(NamedTuple):
    """``total_TH`` (fp32) and the seconds that are the group's."""

    total_TH: torch.Tensor
    seconds: float


def alone(
    fabric: Fabric,
    caller: Caller,
    step: StepContext,
    layer: int,
    hidden_TH: torch.Tensor,
    pairs: Pairs,
    clock: Clock,
) -> Computed | None:
    """What the only group makes of a layer; None where there are others, or none, or it fails: then somebody with
    patience is to ask. Books the group's time.

    Raises:
        InternalError: the group failed to compute.
    """
    copies = fabric.copies(layer)
    if len(copies.groups) != 1 or not copies.complete:
        return None
    (group,) = copies.groups
    link = fabric.up(group)
    if not isinstance(link, InprocTransport) or not link.inline:
        return None
    call = caller.call(step, layer, step.priority)
    weight_P = pairs.weight_TK.detach().reshape(-1).float().cpu().numpy()
    rows = LayerRows.of(hidden_TH, pairs.rows_P, pairs.index_TK.reshape(-1).cpu().numpy(), weight_P)
    try:
        reply = link.at_once(call, rows)
    except RETRIED as exc:
        log.warning("layer %d: group %d in this process failed (%s); asking it again", layer, group, exc)
        return None
    except ExpertMeshError as exc:
        raise InternalError(f"MoE layer {layer} of group {group}: {exc}") from exc
    caller.speeds.sent()
    ledger = step.ledger
    ledger.called(group, len(rows.hidden_TH), rows.hidden_TH.nbytes + reply.partial_TH.nbytes)
    ledger.wait(group, layer, Stage.GROUP_COMPUTE, reply.compute_s)
    if reply.load_s > 0:
        ledger.wait(group, layer, Stage.COLD_LOAD, reply.load_s)
        step.events.append(cold_load(reply, clock(), group, layer))
    return Computed(reply.partial_TH, reply.compute_s + reply.load_s)


def cold_load(reply: LayerReply, answered_s: float, group: int, layer: int) -> StepEvent:
    """That a group had to wait for weights."""
    begun_s = answered_s - reply.compute_s - reply.load_s
    return StepEvent("cold_load", begun_s, reply.load_s, group, layer, reply.load_expert, reply.load_bytes)
