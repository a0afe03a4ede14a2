"""What the call that is being computed waits for: weights that were not in compute memory."""

from __future__ import annotations


class LoadNotes:
    """One a compute thread, which resets it before each call; whoever fetches weights adds to it."""

    __slots__ = ("_worst_s", "expert", "num_bytes", "seconds")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """A new call begins."""
        self.seconds, self.expert, self.num_bytes, self._worst_s = 0.0, -1, 0, 0.0

    def add(self, expert: int, seconds: float, num_bytes: int) -> None:
        """The call waited for the weights of a logical expert."""
        self.seconds += seconds
        self.num_bytes += num_bytes
        if seconds >= self._worst_s:
            self._worst_s, self.expert = seconds, expert
