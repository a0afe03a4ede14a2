"""The error tree. Every error that can reach a user is one of these.

::

    ExpertMeshError             code, retryable; str(error) is one line for a person
    ├── InvalidArgument         INVALID_ARGUMENT    what the caller sent is wrong; names field, value, limit, remedy
    ├── ConfigError             INVALID_ARGUMENT    a flag, key or environment variable is wrong
    ├── CheckpointError         FAILED_PRECONDITION the model directory is missing something or damaged
    │   └── UnsupportedModel    UNIMPLEMENTED       this model cannot be served right, so it is not served
    ├── Overloaded              RESOURCE_EXHAUSTED  the queue is full: retry later or elsewhere
    ├── DeadlineExceeded        DEADLINE_EXCEEDED   the caller's time is up
    ├── Cancelled               CANCELLED           the caller left
    ├── Unavailable             UNAVAILABLE         starting, draining, or an expert has no living copy: retry
    │   └── LinkBroken          UNAVAILABLE         one router-to-group link failed
    ├── MissingExperts          FAILED_PRECONDITION a group was asked for experts that it does not hold
    ├── Unauthenticated         UNAUTHENTICATED     no token, nobody's, or an expired one
    ├── Forbidden               PERMISSION_DENIED   the token is good, but not for this
    ├── LinkRefused             PERMISSION_DENIED   handshake: other protocol, model, dtype or cluster secret
    └── InternalError           INTERNAL            our own bug; the log has the details, the client has not

``code`` is the name of a gRPC status code; nothing here imports gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence


class ExpertMeshError(Exception):
    """Base of all errors of the project."""

    code = "INTERNAL"
    retryable = False


class InvalidArgument(ExpertMeshError):
    """What the caller sent is wrong.

    ``field`` is the name of the offending field, ``value`` what was sent (shortened), ``limit`` what is allowed.
    """

    code = "INVALID_ARGUMENT"

    def __init__(self, field: str, value: object, limit: str) -> None:
        shown = repr(value)
        if len(shown) > 60:
            shown = shown[:57] + "..."
        super().__init__(f"{field}: got {shown}; {limit}")
        self.field, self._given = field, (field, value, limit)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), self._given  # Ray and Serve pickle errors between processes


class ConfigError(ExpertMeshError):
    """A flag, a key of the configuration file or an environment variable is wrong."""

    code = "INVALID_ARGUMENT"


class CheckpointError(ExpertMeshError):
    """The model directory cannot be read as a checkpoint."""

    code = "FAILED_PRECONDITION"


class UnsupportedModel(CheckpointError):
    """The model is readable but cannot be served exactly, so it is refused by name."""

    code = "UNIMPLEMENTED"


class Overloaded(ExpertMeshError):
    """The queue is full."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True


class DeadlineExceeded(ExpertMeshError):
    """The deadline that the caller or the configuration set has passed."""

    code = "DEADLINE_EXCEEDED"


class Cancelled(ExpertMeshError):
    """The caller left."""

    code = "CANCELLED"


class Unavailable(ExpertMeshError):
    """Not now: starting, draining, or an expert has no living copy."""

    code = "UNAVAILABLE"
    retryable = True


class LinkBroken(Unavailable):
    """A link from a router to a group failed; calls in flight on it have no answer."""


class MissingExperts(ExpertMeshError):
    """A group was asked for experts that it does not hold (a stale placement table)."""

    code = "FAILED_PRECONDITION"
    retryable = True

    def __init__(self, group: int, layer: int, experts: Sequence[int]) -> None:
        super().__init__(f"group {group} does not hold experts {list(experts)} of MoE layer {layer}")
        self.group, self.layer, self.experts = group, layer, tuple(experts)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self.group, self.layer, self.experts)


class Unauthenticated(ExpertMeshError):
    """Nobody knows who is asking."""

    code = "UNAUTHENTICATED"


class Forbidden(ExpertMeshError):
    """Whoever asks may not do that."""

    code = "PERMISSION_DENIED"


class LinkRefused(ExpertMeshError):
    """The two ends of a link do not belong together."""

    code = "PERMISSION_DENIED"


class InternalError(ExpertMeshError):
    """A bug of ours. The message is safe to show; details are in the log."""


ERROR_BY_CODE: dict[str, type[ExpertMeshError]] = {
    kind.code: kind
    for kind in (
        CheckpointError,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
        Unauthenticated,
        Forbidden,
        InternalError,
    )
}
