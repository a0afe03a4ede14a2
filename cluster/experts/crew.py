"""Threads that compute parts of one layer side by side, each with one core of its own.

A product of few rows gains little from a second thread inside it; two experts at once gain nearly all of it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

import torch

from cluster.errors import InternalError

JOB_TIMEOUT_S = 120.0

Job = Callable[[], None]


class Crew:
    """``size`` threads, the caller among them. One thread uses it at a time.

    While it works, the caller's products run on one thread each; afterwards on as many as before.
    """

    def __init__(self, size: int) -> None:
        self.size = max(1, size)
        self._helpers = [_Helper(number) for number in range(1, self.size)]

    def run(self, jobs: Sequence[Job]) -> None:
        """Runs all jobs, at most ``size``; the first one in the calling thread. Raises what a job raised."""
        if self.size == 1:
            for job in jobs:
                job()
            return
        before = torch.get_num_threads()
        busy = list(zip(self._helpers, jobs[1:], strict=False))
        for helper, job in busy:
            helper.start(job)
        torch.set_num_threads(1)
        try:
            jobs[0]()
        finally:
            torch.set_num_threads(before)
            errors = [helper.finish() for helper, _ in busy]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Ends the threads."""
        for helper in self._helpers:
            helper.close()


class _Helper:
    def __init__(self, number: int) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._done = threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=f"crew-{number}", daemon=True).start()

    def start(self, job: Job) -> None:
        self._jobs.put(job)

    def finish(self) -> BaseException | None:
        if not self._done.acquire(timeout=JOB_TIMEOUT_S):
            return InternalError(f"a thread that computes experts did not finish within {JOB_TIMEOUT_S:g} s")
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        self._jobs.put(None)

    @torch.inference_mode()
    def _run(self) -> None:
        torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as exc:  # noqa: BLE001 - raised again by whoever waits for the job
                self._error = exc
            self._done.release()
