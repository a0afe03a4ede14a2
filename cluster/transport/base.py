"""What a link between a router and a group is, whatever carries it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from cluster.core import Clock, Deadline, GroupId, LayerCall, Order
from cluster.errors import DeadlineExceeded, ExpertMeshError

Pairs = np.ndarray[Any, np.dtype[np.int32]]


# Tuples, and pairs in one array: these are made several times for each layer of each step.


class LayerRows(NamedTuple):
    """Payload of a layer call.

    ``hidden_TH`` holds the rows; they are where the sender had them, and at the receiver where the link put them.
    ``pairs_3P`` (int32, on the CPU) says what is wanted of them: pair ``p`` asks for logical expert ``pairs_3P[1, p]``
    on row ``pairs_3P[0, p]``, with the gate weight whose fp32 bits are ``pairs_3P[2, p]``.
    """

    hidden_TH: torch.Tensor
    pairs_3P: Pairs

    @classmethod
    def of(cls, hidden_TH: torch.Tensor, row_P: Any, expert_P: Any, weight_P: Any) -> LayerRows:
        """From separate pairs; anything that numpy takes as arrays."""
        pairs_3P = np.empty((3, len(row_P)), np.int32)
        pairs_3P[0], pairs_3P[1] = row_P, expert_P
        pairs_3P[2].view(np.float32)[:] = weight_P
        return cls(hidden_TH, pairs_3P)

    @property
    def pair_row_P(self) -> torch.Tensor:
        """Rows of the pairs, int32."""
        return torch.from_numpy(self.pairs_3P[0])

    @property
    def pair_expert_P(self) -> torch.Tensor:
        """Logical experts of the pairs, int32."""
        return torch.from_numpy(self.pairs_3P[1])

    @property
    def pair_weight_P(self) -> torch.Tensor:
        """Gate weights of the pairs, fp32."""
        return torch.from_numpy(self.pairs_3P[2].view(np.float32))


class LayerReply(NamedTuple):
    """``partial_TH`` (fp32): per row the weighted sum of this group's experts. Times by the group's own clock.

    ``load_s``: seconds that the call waited for weights that were not in memory; ``compute_s`` is without them.
    ``load_expert`` is the logical expert that took longest, ``load_bytes`` are of all that were loaded.
    ``partial_TH`` may lie in memory that the link uses again once the tensor is gone: read it, do not write to it.
    """

    partial_TH: torch.Tensor
    queue_s: float = 0.0
    compute_s: float = 0.0
    load_s: float = 0.0
    load_expert: int = -1
    load_bytes: int = 0


class PendingReply:
    """The reply to one call: set once, by whoever carries it; waited for by the dispatcher.

    One that is not ``latched`` has another way to wait, in `_wait`.
    """

    __slots__ = (
        "__weakref__",
        "_claim",
        "_clock",
        "_done",
        "_error",
        "_reply",
        "_unanswered",
        "answered_s",
        "call",
        "group",
        "sent_s",
    )

    def __init__(self, group: GroupId, call: LayerCall, clock: Clock = time.monotonic, latched: bool = True) -> None:
        self.group, self.call = group, call
        self.sent_s = clock()
        self.answered_s = 0.0
        self._clock = clock
        self._claim = threading.Lock()  # taken once, by whoever answers first, and never released
        self._unanswered: threading.Lock | None = None  # held until there is an answer
        if latched:
            self._unanswered = threading.Lock()
            self._unanswered.acquire()
        self._done = False
        self._reply: LayerReply | None = None
        self._error: ExpertMeshError | None = None

    def resolve(self, reply: LayerReply, answered_s: float | None = None) -> bool:
        """Sets the reply, which arrived at ``answered_s`` (default: now). False, and nothing else, if the call was
        answered before."""
        return self._answer(reply, None, answered_s)

    def fail(self, error: ExpertMeshError) -> bool:
        """Sets a typed error. False, and nothing else, if the call was answered before."""
        return self._answer(None, error, None)

    def _answer(self, reply: LayerReply | None, error: ExpertMeshError | None, answered_s: float | None) -> bool:
        if not self._claim.acquire(blocking=False):
            return False
        self._reply, self._error = reply, error
        self.answered_s = self._clock() if answered_s is None else answered_s
        self._done = True
        if self._unanswered is not None:
            self._unanswered.release()
        return True

    def done(self) -> bool:
        """True once a reply or an error is set."""
        return self._done

    def failed(self) -> bool:
        """True once an error is set."""
        return self._done and self._error is not None

    def compute_s(self) -> float:
        """What the reply says of computing, loads included; 0 while there is none."""
        return 0.0 if self._reply is None else self._reply.compute_s + self._reply.load_s

    def load_s(self) -> float:
        """What the reply says of loads; 0 while there is none."""
        return 0.0 if self._reply is None else self._reply.load_s

    def wait(self, deadline: Deadline) -> LayerReply:
        """The reply. One thread waits.

        Raises:
            DeadlineExceeded: none came in time.
            ExpertMeshError: whatever the call failed with.
        """
        if not self._done:
            self._wait(deadline)
        if not self._done:
            raise DeadlineExceeded(f"group {self.group} did not answer layer {self.call.layer} in time")
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply

    def _wait(self, deadline: Deadline) -> None:
        """Returns when there is an answer, or the time is up. Links whose waiters do the reading replace this."""
        assert self._unanswered is not None
        self._unanswered.acquire(timeout=min(deadline.remaining_s(), threading.TIMEOUT_MAX))


class Transport(Protocol):
    """One link from a router to a group. Calls may be in flight together; replies come in any order.

    ``kind`` is the name users know ("shm", "grpc", "gloo", "nccl", "inproc"); ``address`` is empty in process.
    """

    @property
    def kind(self) -> str:
        """What carries calls now."""
        ...

    group: GroupId
    address: str

    def submit(self, call: LayerCall, rows: LayerRows, deadline: Deadline) -> PendingReply:
        """Sends a call. The rows must not be changed until its reply is there.

        Raises:
            LinkBroken: the link is down; nothing was sent.
            DeadlineExceeded: there was no room for the call in time; nothing was sent.
        """
        ...

    def cancel(self, pending: PendingReply) -> None:
        """Says that the reply is no longer wanted. Never raises. A call of another link only fails."""
        ...

    def order(self, order: Order, at_once: bool = False) -> None:
        """Says which experts of a layer calls will probably want soon: in front of the next call, or at once. A hint:
        never waits or raises, may be lost. To be called by the thread that submits calls."""
        ...

    def healthy(self) -> bool:
        """False once the link is down for good; a new one must be made then."""
        ...

    def close(self) -> None:
        """Ends the link; calls in flight fail with LinkBroken. May be called twice."""
        ...


class CallHandler(Protocol):
    """What answers layer calls on the group's side: whoever carries them hands them to this."""

    def submit(
        self, call: LayerCall, rows: LayerRows, pending: PendingReply, lend: Callable[[], object] | None = None
    ) -> None:
        """Queues the call; ``pending`` is set when it is computed. Never blocks, never raises. ``lend``, if it is
        called, has another thread call `work`."""
        ...

    def work(self) -> None:
        """Computes, in the calling thread, the call that it was lent for, unless another thread has it."""
        ...

    def cancel(self, pending: PendingReply) -> None:
        """Drops the call if it has not been computed yet."""
        ...

    def order(self, order: Order) -> None:
        """Calls will probably want these experts soon. Never blocks, never raises."""
        ...
