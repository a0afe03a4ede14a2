"""What a link between a router and a group is, whatever carries it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.core import Clock, Deadline, GroupId, LayerCall
from cluster.errors import DeadlineExceeded, ExpertMeshError


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Payload of a layer call, on the CPU.

    ``hidden_TH`` holds the rows; pair ``p`` asks for logical expert ``pair_expert_P[p]`` (int32) on row
    ``pair_row_P[p]`` (int32) with gate weight ``pair_weight_P[p]`` (fp32).
    """

    hidden_TH: torch.Tensor
    pair_row_P: torch.Tensor
    pair_expert_P: torch.Tensor
    pair_weight_P: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerReply:
    """``partial_TH`` (fp32): per row the weighted sum of this group's experts. Times by the group's own clock."""

    partial_TH: torch.Tensor
    queue_s: float = 0.0
    compute_s: float = 0.0


class PendingReply:
    """The reply to one call: set once, by whoever carries it; waited for by the dispatcher."""

    def __init__(self, group: GroupId, call: LayerCall, clock: Clock = time.monotonic) -> None:
        self.group, self.call = group, call
        self.sent_s = clock()
        self.answered_s = 0.0
        self._clock = clock
        self._event = threading.Event()
        self._claim = threading.Lock()  # taken once, by whoever answers first, and never released
        self._reply: LayerReply | None = None
        self._error: ExpertMeshError | None = None

    def resolve(self, reply: LayerReply) -> bool:
        """Sets the reply. False, and nothing else, if the call was answered before."""
        return self._answer(reply, None)

    def fail(self, error: ExpertMeshError) -> bool:
        """Sets a typed error. False, and nothing else, if the call was answered before."""
        return self._answer(None, error)

    def _answer(self, reply: LayerReply | None, error: ExpertMeshError | None) -> bool:
        if not self._claim.acquire(blocking=False):
            return False
        self._reply, self._error, self.answered_s = reply, error, self._clock()
        self._event.set()
        return True

    def done(self) -> bool:
        """True once a reply or an error is set."""
        return self._event.is_set()

    def wait(self, deadline: Deadline) -> LayerReply:
        """The reply.

        Raises:
            DeadlineExceeded: none came in time.
            ExpertMeshError: whatever the call failed with.
        """
        if not self._event.wait(deadline.remaining_s()):
            raise DeadlineExceeded(f"group {self.group} did not answer layer {self.call.layer} in time")
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply


class Transport(Protocol):
    """One link from a router to a group. Calls may be in flight together; replies come in any order.

    ``kind`` is the name users know ("grpc", "inproc"); ``address`` is empty in process.
    """

    kind: str
    group: GroupId
    address: str

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """Sends a call. The rows must not be changed until its reply is there.

        Raises:
            LinkBroken: the link is down; nothing was sent.
        """
        ...

    def cancel(self, pending: PendingReply) -> None:
        """Says that the reply is no longer wanted. Never raises."""
        ...

    def healthy(self) -> bool:
        """False once the link is down for good; a new one must be made then."""
        ...

    def close(self) -> None:
        """Ends the link; calls in flight fail with LinkBroken. May be called twice."""
        ...


class CallHandler(Protocol):
    """What answers layer calls on the group's side: whoever carries them hands them to this."""

    def submit(self, call: LayerCall, rows: LayerRows, pending: PendingReply) -> None:
        """Queues the call; ``pending`` is set when it is computed. Never blocks, never raises."""
        ...

    def cancel(self, pending: PendingReply) -> None:
        """Drops the call if it has not been computed yet."""
        ...
