"""One expert group: a bounded queue of layer calls, and one thread at a time that computes them.

Calls that were sent again and decode calls are taken before prefill calls. Whoever carries the calls (gRPC server,
in-process link) only queues them and is told when they are done. Local sockets are read by the compute thread itself
between two calls, so that a call over shared memory meets one thread only. A gRPC stream lends the thread that will
send the answer: where nothing else is going on it computes a decode call itself, which spares waking another one.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import torch

from cluster.core import Clock, LayerCall, Order, Priority
from cluster.errors import DeadlineExceeded, ExpertMeshError, Overloaded, Unavailable
from cluster.experts.answering import Compute, Lend, Observe, OnOrder, answer
from cluster.experts.loads import LoadNotes
from cluster.experts.sockets import Sockets
from cluster.kernels.served import ServedLayers
from cluster.transport.base import LayerRows, PendingReply

log = logging.getLogger(__name__)

_PREFILL = int(Priority.PREFILL)
MAX_LAYERS = 4096
MAX_QUEUED_BYTES = 1024 * 1024 * 1024
CHANGE_S = 60.0
MAX_ROUNDS = 64
"""Looks at the sockets before the next call is computed, whatever still comes in."""


class _Ready(threading.local):
    """Whether this thread has been made ready to compute."""

    yes = False


class ExpertHost:
    """Queue and compute thread of one group. ``compute(layer, rows)`` is `ExpertBank.compute`, ``notes`` what it says
    of weights that it waited for; ``observe`` is told of calls that belong to a trace.

    Every call that is submitted is answered: with a reply, or with a typed error. Calls of layers that are ``served``
    may be computed where they are read, without ``compute``.
    """

    def __init__(
        self,
        compute: Compute,
        name: str = "experts",
        threads: int = 0,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        clock: Clock = time.monotonic,
        notes: LoadNotes | None = None,
        observe: Observe | None = None,
        on_order: OnOrder | None = None,
        served: ServedLayers | None = None,
    ) -> None:
        self._on_order, self.served = on_order, served
        self._steps: dict[int, int] = {}  # the step whose call a layer had last
        self._compute, self._clock, self._max_bytes = compute, clock, max_queued_bytes
        self._notes, self._observe = notes or LoadNotes(), observe
        self._heap: list[tuple[int, int, float, LayerCall, LayerRows, PendingReply]] = []
        self._tickets = itertools.count()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._computes = threading.Lock()  # held by the thread that computes
        self._ready = _Ready()
        self._lends = threads == 1 and on_order is None
        self._lent: tuple[int, int, float, LayerCall, LayerRows, PendingReply] | None = None
        self._closed = self._busy = self._asleep = self._fresh = False
        self.sockets = Sockets()
        """Those that the compute thread reads."""
        self._calls = 0
        self._busy_s = 0.0
        self._progress_s = clock()
        self._threads = threads
        self._changes: list[tuple[Callable[[], None], Future[None]]] = []
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: LayerCall, rows: LayerRows, pending: PendingReply, lend: Lend | None = None) -> None:
        """Queues a call; ``pending`` gets the reply, or Overloaded at once when too many bytes wait. ``lend`` wakes a
        thread that calls `work` next; it is called when a call that is not prefill finds nothing else
        to be done. Not in a group that waits for weights, since orders would wait too, nor in one that computes with
        several threads: a second team of them would make libgomp put all to sleep (`cluster.kernels.team`)."""
        size = rows.hidden_TH.nbytes
        error: ExpertMeshError | None = None
        asleep = lent = False
        self._note_step(call)
        with self._lock:
            if self._closed:
                error = Unavailable("the group is shutting down")
            elif self._queued_bytes + size > self._max_bytes and self._heap:
                error = Overloaded(f"{self._queued_bytes} bytes are queued; the limit is {self._max_bytes}")
            else:
                self._queued_bytes += size
                entry = (int(call.priority), next(self._tickets), self._clock(), call, rows, pending)
                heapq.heappush(self._heap, entry)
                alone = self._asleep and not self._busy and len(self._heap) == 1 and not self.sockets.serving
                lent = lend is not None and alone and call.priority < _PREFILL and self._lends
                if lent:
                    self._lent = entry
                else:
                    asleep, self._asleep = self._asleep, False
        if lent and lend is not None:
            lend()
        if asleep:
            self.sockets.ring()  # not under the lock, which whom it wakes takes first
        if error is not None:
            pending.fail(error)

    def submit_here(self, call: LayerCall, rows: LayerRows, pending: PendingReply) -> None:
        """As `submit`, for whom the compute thread has called because there was something to read. A call that is not
        prefill, and that alone woke the thread up, is computed at once: it would only be queued to be taken out."""
        fresh, self._fresh = self._fresh, False
        if not (fresh and call.priority < _PREFILL and not self._heap and not self._closed):
            self.submit(call, rows, pending)
            return
        self._note_step(call)
        with self._computes:
            self._get_ready()
            self._progress_s, self._busy = self._clock(), True
            self._answer_one(self._progress_s, call, rows, pending)

    def _note_step(self, call: LayerCall) -> None:
        if len(self._steps) > MAX_LAYERS:  # no model has so many: somebody makes them up
            self._steps.clear()
        self._steps[call.layer] = call.step_id

    def cancel(self, pending: PendingReply) -> None:
        """The call is skipped if it is still queued."""
        pending.fail(DeadlineExceeded("the call was cancelled"))

    def order(self, order: Order) -> None:
        """Calls will probably want these experts soon; nothing where all of them are in memory, or where the call that
        it was meant for came first."""
        if self._on_order is not None and self._steps.get(order.layer) != order.step_id:
            self._on_order(order)

    @property
    def calls(self) -> int:
        """Calls that were computed."""
        return self._calls + self.sockets.served[0]

    @property
    def busy_s(self) -> float:
        """Seconds of computing."""
        return self._busy_s + self.sockets.served[1]

    def progress_age_s(self) -> float:
        """Seconds since the thread last finished or began a call; 0 when it has nothing to do."""
        since_s = self.sockets.served[2]
        with self._lock:
            age_s = self._clock() - self._progress_s if self._heap or self._busy else 0.0
        return max(age_s, time.monotonic() - since_s if since_s else 0.0)

    def between_calls(self, change: Callable[[], None]) -> None:
        """Runs what changes that which calls are computed with, in the compute thread while it computes none; waits
        for it. (A thread that was lent may compute, with what it took before.)

        Raises:
            Unavailable: the thread has not come to it within `CHANGE_S`, or ends.
        """
        done: Future[None] = Future()
        with self._lock:
            if self._closed:
                raise Unavailable("the group is shutting down")
            self._changes.append((change, done))
        self.sockets.ring()
        try:
            done.result(CHANGE_S)
        except TimeoutError:
            if done.cancel():
                raise Unavailable(f"the group's thread has been computing for {CHANGE_S:.0f} s") from None
            done.result()

    def _change(self) -> None:
        with self._lock:
            changes, self._changes = self._changes, []
        for change, done in changes:
            if done.set_running_or_notify_cancel():
                try:
                    change()
                except Exception as exc:
                    log.exception("a change between calls failed")
                    done.set_exception(exc)
                else:
                    done.set_result(None)

    def close(self) -> None:
        """Ends the thread; queued calls fail."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            queued, self._heap = self._heap, []
            changes, self._changes = self._changes, []
            self.sockets.ring()
        for entry in queued:
            entry[-1].fail(Unavailable("the group is shutting down"))
        for _, done in changes:
            if done.set_running_or_notify_cancel():  # else whoever wanted it has given up
                done.set_exception(Unavailable("the group is shutting down"))
        self._thread.join(timeout=10)
        if self._computes.acquire(timeout=10):  # a thread that was lent may still compute
            self._computes.release()

    def work(self) -> None:
        """Computes the call that the calling thread was lent for, unless another thread has it, or something more
        urgent came: that is left to the compute thread. So is a call that nobody takes, within a second."""
        if self._computes.acquire(blocking=False):
            try:
                self._compute_next(lent=True)
            finally:
                self._computes.release()
        with self._lock:  # who computed just now may have been done with the queue before the call came
            asleep = self._asleep and bool(self._heap)
            if asleep:
                self._asleep = False
        if asleep:
            self.sockets.ring()

    def _run(self) -> None:
        self._get_ready()
        while not self._closed:
            self._listen()
            if self._changes:
                self._change()
            if self._heap:
                with self._computes:
                    self._compute_next()
            elif not self._busy:
                self._progress_s = self._clock()

    def _compute_next(self, lent: bool = False) -> None:
        """Takes the most urgent call, if there is one (``lent``: and it is the one that a thread was lent for), and
        answers it. By whoever holds the right to compute."""
        self._get_ready()
        with self._lock:
            if self._closed or not self._heap:
                return
            if lent and self._heap[0] is not self._lent:
                return
            _, _, queued_s, call, rows, pending = heapq.heappop(self._heap)
            self._lent = None
            self._queued_bytes -= rows.hidden_TH.nbytes
            self._progress_s, self._busy = self._clock(), True
        self._answer_one(queued_s, call, rows, pending)

    def _get_ready(self) -> None:
        """To compute in this thread."""
        if not self._ready.yes:
            self._ready.yes = True
            _yield_to_senders()
            if self._threads:
                torch.set_num_threads(self._threads)  # torch keeps this number for each thread

    def _answer_one(self, queued_s: float, call: LayerCall, rows: LayerRows, pending: PendingReply) -> None:
        try:
            self._answer(queued_s, call, rows, pending)
        finally:
            now_s = self._clock()
            self._busy_s += now_s - self._progress_s
            self._progress_s, self._busy = now_s, False

    def _listen(self) -> None:
        """Reads what the sockets have, or after a wait for it until a call that is not prefill has come; waits for it,
        or for a call, when nothing is queued."""
        with self._lock:
            self._asleep = not self._heap and not self._closed
        waits, slept = self._asleep, False
        for _ in range(MAX_ROUNDS):
            found = self.sockets.poll(waits, serves=not self._heap)
            slept, waits = slept or found.slept, False
            self._asleep = False
            if not found.events or found.only_bell:
                return
            self._fresh = alone = slept and len(found.events) == 1
            for fd, event in found.events:
                ready = self.sockets.ready(fd)
                if ready is not None:
                    try:
                        ready(event, found.size)
                    except Exception:
                        log.exception("reading a local socket failed")
            if alone and not self._fresh:
                slept = False  # a call may have been computed meanwhile, and what came then is all read first
            heap = self._heap  # which `close` takes away
            if slept and heap and heap[0][0] < _PREFILL:
                return  # nothing has piled up behind a call that has just come, and nothing is more urgent

    def _answer(self, queued_s: float, call: LayerCall, rows: LayerRows, pending: PendingReply) -> None:
        started_s = self._clock()
        waited_s = started_s - queued_s
        if pending.done():
            return  # cancelled while it waited
        if call.timeout_ms and waited_s * 1e3 > call.timeout_ms:
            pending.fail(DeadlineExceeded(f"the call waited {waited_s:.3f} s, longer than its {call.timeout_ms} ms"))
            return
        if answer(self._compute, call, rows, pending, waited_s, self._clock, self._notes, self._observe):
            self._calls += 1


def _yield_to_senders() -> None:
    """From now on this thread, when it is woken, waits for a free core instead of taking one from who runs there, such
    as the one who woke it. Threads that were given another scheduling keep it.

    With two groups on two cores a router was off its core for 180 µs whenever it sent something, 9 ms of a step of
    12 layers.
    """
    with contextlib.suppress(OSError, AttributeError):  # not every system has it, or lets us
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
