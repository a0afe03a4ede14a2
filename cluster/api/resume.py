"""Whether a stream that broke can go on at another router, and with what request. Pure.

What is generated depends on the request alone (greedy, or drawn with its seed by position), so another router that is
told what has been received goes on as the first one would have.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from cluster.core import Clock
from cluster.rpc.v1 import inference_pb2

PAUSE_S, MAX_PAUSE_S = 0.05, 1.0


class Resumable:
    """One request and what has come of it. Where it samples without a seed it gets one, or it could not go on.

    ``patience_s`` is how long a break may last.
    """

    def __init__(
        self, request: inference_pb2.GenerateRequest, patience_s: float, clock: Clock = time.monotonic
    ) -> None:
        self._request, self._patience_s, self._clock = inference_pb2.GenerateRequest(), patience_s, clock
        self._request.CopyFrom(request)
        if self._request.temperature > 0 and not self._request.HasField("seed"):
            self._request.seed = secrets.randbits(64)
        self._began_s = clock()
        self._broken_s: float | None = None
        self._pause_s = PAUSE_S
        self.breaks = 0

    @property
    def received(self) -> Sequence[int]:
        """Token ids so far."""
        return self._request.received_ids

    def got(self, chunk: inference_pb2.GenerateChunk) -> None:
        """A chunk came: the stream is whole."""
        self._request.received_ids.extend(token.id for token in chunk.tokens)
        self._broken_s, self._pause_s = None, PAUSE_S

    def next_request(self) -> inference_pb2.GenerateRequest:
        """For whoever goes on."""
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self._request)
        if request.HasField("deadline_ms"):
            spent_ms = int((self._clock() - self._began_s) * 1e3)
            request.deadline_ms = max(1, request.deadline_ms - spent_ms)
        return request

    def broke(self, tried_all: bool) -> float | None:
        """The stream broke, or could not begin. Seconds to wait before the next try; None to give up. ``tried_all``:
        every address was tried since the last chunk; where nothing has come yet, that is the end of it."""
        now_s = self._clock()
        self.breaks += 1
        if self._broken_s is None:
            self._broken_s = now_s
        if not tried_all:
            return 0.0
        if not self._request.received_ids or now_s - self._broken_s > self._patience_s:
            return None
        pause_s, self._pause_s = self._pause_s, min(MAX_PAUSE_S, 2 * self._pause_s)
        return pause_s
