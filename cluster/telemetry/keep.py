"""Which traces are kept, decided when the request is over. Pure."""

from __future__ import annotations

from collections import deque

from cluster.telemetry.records import RequestRecord

RECENT, ENOUGH = 256, 32
SLOW_QUANTILE, SLOW_FACTOR = 0.95, 1.5
_ALL = 2**64


class TailSampler:
    """Failed, cold, failed-over and slow requests are always kept; of the others ``ratio``, by trace id, so that every
    process decides alike. Slow: time to first token, or time an output token, is in the top twentieth of the last
    ones and half as much again as their median."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._firsts: deque[float] = deque(maxlen=RECENT)
        self._gaps: deque[float] = deque(maxlen=RECENT)

    def why(self, record: RequestRecord) -> str:
        """Why the trace is kept; empty if it is not."""
        slow = self._slow(record)
        if record.error_code and record.error_code != "CANCELLED":
            return "error"
        kinds = {event.kind for event in record.account.events} if record.account is not None else set()
        if "failover" in kinds:
            return "failover"
        if "cold_load" in kinds:
            return "cold"
        if slow:
            return "slow"
        if record.sampled and int(record.ref.trace_id[16:], 16) < self._ratio * _ALL:
            return "ratio"
        return ""

    def _slow(self, record: RequestRecord) -> bool:
        account = record.account
        if account is None or account.first_token_s is None:
            return False
        slow = _stands_out(self._firsts, account.first_token_s - record.arrived_s)
        if len(account.tokens) > 1:
            gap_s = (account.tokens[-1] - account.tokens[0]) / (len(account.tokens) - 1)
            slow = _stands_out(self._gaps, gap_s) or slow
        return slow


def _stands_out(recent: deque[float], value: float) -> bool:
    """Compares with the ones before, and joins them."""
    known = sorted(recent)
    recent.append(value)
    if len(known) < ENOUGH:
        return False
    return value > known[int(SLOW_QUANTILE * len(known))] and value > SLOW_FACTOR * known[len(known) // 2]
