"""The nouns: what requests, layer calls, groups and placement tables are. No I/O, no torch, no Ray.

Shape legend, used as suffixes of array names in the whole project: T tokens (rows), H hidden size, I expert inner
size, E logical experts of a layer, K experts a token, L MoE layers, G groups, P (token, expert) pairs, V vocabulary.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

Clock = Callable[[], float]
"""Monotonic seconds."""

GroupId = int


@dataclass(frozen=True, slots=True, order=True)
class ExpertId:
    """Logical expert ``expert`` of MoE layer ``layer`` (MoE layers are numbered from 0, dense layers do not count)."""

    layer: int
    expert: int


class Order(NamedTuple):
    """What a MoE layer's call of a step will want: ``chances[e]`` of each logical expert, 255 for certainly."""

    step_id: int
    layer: int
    chances: bytes


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in monotonic time (seconds) by which something must be done. ``at_s`` may be infinite."""

    at_s: float
    clock: Clock = time.monotonic

    @classmethod
    def after(cls, seconds: float, clock: Clock = time.monotonic) -> Deadline:
        """The deadline ``seconds`` from now."""
        return cls(clock() + seconds, clock)

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - self.clock())

    def expired(self) -> bool:
        """True when no time is left."""
        return self.remaining_s() <= 0.0

    def earlier(self, other: Deadline) -> Deadline:
        """Whichever of the two comes first."""
        return self if self.at_s <= other.at_s else other


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    num_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class StopParams:
    """When a sequence ends. ``stop_ids`` already holds the model's end ids unless the caller ignores them."""

    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Request:
    """One generation as the engine takes it: token ids, already validated."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    stop: StopParams
    deadline: Deadline
    trace_id: str = ""
    span_id: str = ""
    trace_detail: bool = False
    want_logits: bool = False
    received_ids: tuple[int, ...] = ()
    """The beginning of its answer, made elsewhere."""


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    LENGTH = "length"
    STOP_ID = "stop_id"
    STOP_STRING = "stop_string"


class Priority(enum.IntEnum):
    """Order in which a group takes layer calls: lower first."""

    RESENT = 0
    """A call that failed elsewhere: a whole step has waited for it already."""
    DECODE = 1
    PREFILL = 2


class LayerCall(NamedTuple):
    """Header of one message from a router to a group: which layer, under which table, on whose behalf.

    ``timeout_ms`` is the time left for the call when it was sent (clocks of two hosts are never compared).
    """

    call_id: int
    step_id: int
    layer: int
    table_epoch: int
    table_version: int
    priority: Priority = Priority.DECODE
    timeout_ms: int = 0
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """How a group whose experts exceed its budget gets on: experts in memory and that fit, and since its start loads
    and evictions, loads ``ahead`` of calls, and of each MoE layer what `cluster.experts.store.LayerStats` counts."""

    budget_bytes: int
    resident: int
    capacity: int
    found: tuple[int, ...] = ()
    hits: tuple[int, ...] = ()
    stalls: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    wasted_bytes: tuple[int, ...] = ()
    stalled_s: float = 0.0
    loads: int = 0
    loads_s: float = 0.0
    loaded_bytes: int = 0
    evictions: int = 0
    ahead: int = 0
    progress_age_s: float = 0.0
    direct: bool = False
    """Experts are read past the page cache."""
    gap_s: float = 0.0
    """What it usually takes from one layer's call to the next one's."""
    expert_bytes: tuple[int, ...] = ()
    """Of one expert, by MoE layer."""
    resident_experts: tuple[tuple[int, ...], ...] = ()
    """Experts in memory, by MoE layer."""


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """What a group says of itself: where its data plane listens and what it holds.

    ``holdings`` is, per MoE layer, the sorted logical experts that it can compute. ``incarnation`` is new each time
    the group's process is.
    """

    group: GroupId
    address: str
    incarnation: str
    holdings: tuple[tuple[int, ...], ...]
    fingerprint: str
    dtype: str
    pid: int = 0
    host: str = ""
    device: str = "cpu"
    visible_devices: str = ""
    expert_bytes: int = 0
    rss_bytes: int = 0
    anonymous_bytes: int = 0
    calls: int = 0
    progress_age_s: float = 0.0
    numa_node: int = -1
    numa_local_ratio: float | None = None
    store: StoreFacts | None = None
    spans_dropped: int = 0
    expert_sizes: tuple[int, ...] = ()
    """Bytes of one expert in the served dtype, by MoE layer."""
    free_bytes: int = 0
    """Of the memory that experts lie in, the host's or the GPU's; 0: not known."""
    busy_s: float = 0.0
    """Seconds that its compute thread has computed since its start."""
    startup: tuple[tuple[str, float], ...] = ()
    """Phases of its start, and their seconds."""
    refused_links: int = 0
    """Handshakes that it did not accept."""


@dataclass(frozen=True, slots=True)
class PlacementTable:
    """Immutable and versioned: for every logical expert, the groups that hold a copy.

    ``owners[layer][expert]`` is a tuple of group ids, in order of preference; an empty tuple means that no living
    group holds the expert. Tables are ordered by (epoch, version).
    """

    epoch: int
    version: int
    owners: tuple[tuple[tuple[GroupId, ...], ...], ...]

    @property
    def order(self) -> tuple[int, int]:
        """What decides which of two tables is newer."""
        return (self.epoch, self.version)

    def uncovered(self) -> list[ExpertId]:
        """Logical experts that no group holds."""
        return [
            ExpertId(layer, expert)
            for layer, experts in enumerate(self.owners)
            for expert, groups in enumerate(experts)
            if not groups
        ]


@dataclass(frozen=True, slots=True)
class Membership:
    """The placement table together with the groups it names.

    ``progress_age_s`` is how long ago the coordinator's own loop made progress, when it said so.
    """

    table: PlacementTable
    groups: dict[GroupId, GroupInfo] = field(default_factory=dict)
    progress_age_s: float = 0.0
