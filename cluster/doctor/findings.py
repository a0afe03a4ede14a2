"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """``state`` is ok, warn (it works, worse than it could), fail (it will not work) or skip (could not be told);
    ``remedy`` says what to do, where there is something to do."""

    check: str
    state: str
    found: str
    remedy: str = ""
    host: str = ""
