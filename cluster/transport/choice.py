"""Which transports a link may use, best first, from what both ends report. Pure functions.

Whether two ends are on one host is not decided here: names and boot ids do not prove it, an attempt with shared memory
does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AUTO = "auto"
BASE = "grpc"
"""What every link has, and falls back to."""


@dataclass(frozen=True, slots=True)
class End:
    """One end of a link: torch device ("cpu" or "cuda"), PCI address of its GPU, process groups that it can make, and
    whether it takes connections over a local socket (of a router: whether it can make them)."""

    device: str
    gpu: str = ""
    collectives: frozenset[str] = frozenset()
    shm: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A transport worth trying, and why."""

    kind: str
    why: str


def candidates(
    wanted: str, router: End, group: End, path: str = "", trusted: bool = True
) -> tuple[list[Candidate], list[str]]:
    """Transports to try before gRPC, best first, and for each that is left out the reason.

    ``wanted`` is "auto" or one kind; ``path`` says how two GPUs reach each other, where that is known. Process groups
    are for networks that are ``trusted``: nothing about them is encrypted.
    """
    found: list[Candidate] = []
    reasons: list[str] = []
    for kind in ("nccl", "shm") if wanted == AUTO else (wanted,):
        if kind == BASE:
            continue
        reason = _obstacle(kind, router, group)
        if not reason and kind != "shm" and not trusted:
            reason = "TLS is on, and it can be neither encrypted nor authenticated (--trust-network allows it)"
        if reason:
            reasons.append(f"{kind}: {reason}")
        elif kind == "nccl":
            found.append(Candidate(kind, f"GPUs {router.gpu} and {group.gpu}" + (f" by {path}" if path else "")))
        elif kind == "shm":
            found.append(Candidate(kind, "same host: the group read back a nonce from shared memory"))
        else:
            found.append(Candidate(kind, "asked for"))
    return found, reasons


def _obstacle(kind: str, router: End, group: End) -> str:
    if kind == "shm":
        return "" if router.shm and group.shm else "an end has no local socket"
    if kind == "nccl":
        on_cpu = [name for name, end in (("router", router), ("group", group)) if end.device != "cuda"]
        if on_cpu:
            return f"{' and '.join(on_cpu)} on CPU"
        if router.gpu and router.gpu == group.gpu:
            return f"both ends use GPU {router.gpu}, and NCCL wants two"
    lacking = [name for name, end in (("router", router), ("group", group)) if kind not in end.collectives]
    return f"torch of {' and '.join(lacking)} has no {kind}" if lacking else ""


def explain(reasons: Sequence[str]) -> str:
    """One line of several reasons."""
    return "; ".join(reasons)
