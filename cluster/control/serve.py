"""The coordinator's Serve shell: asks groups through Serve handles, keeps the epoch in Ray's key-value store."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ray import serve
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.config import TelemetryConfig
from cluster.control.coordinator import Coordinator
from cluster.core import GroupId, GroupInfo, Membership
from cluster.errors import Unavailable
from cluster.telemetry import logs

ASK_TIMEOUT_S = 2.0
GROUP_APP_PREFIX = "experts-"
_EPOCH_KEY = b"expertmesh:epoch"


def group_app(group: GroupId) -> str:
    """Name of the Serve application of a group."""
    return f"{GROUP_APP_PREFIX}{group}"


def next_epoch() -> int:
    """A number higher than every one before it in this Ray cluster."""
    raw = _internal_kv_get(_EPOCH_KEY)
    epoch = int(raw) + 1 if raw else 1
    _internal_kv_put(_EPOCH_KEY, str(epoch).encode(), overwrite=True)
    return epoch


def ask_group(group: GroupId) -> GroupInfo:
    """One group's info through its Serve handle.

    Raises:
        Unavailable: it did not answer in time.
    """
    try:
        info: GroupInfo = serve.get_app_handle(group_app(group)).info.remote().result(timeout_s=ASK_TIMEOUT_S)
    except (RayError, TimeoutError, serve.exceptions.RayServeException) as exc:
        raise Unavailable(f"group {group} does not answer: {type(exc).__name__}") from exc
    return info


class CoordinatorShell:
    """Deployment ``coordinator`` of the application ``expertmesh``."""

    def __init__(
        self,
        experts_per_layer: Sequence[int],
        groups: Sequence[GroupId],
        start_timeout_s: float,
        telemetry: TelemetryConfig,
    ) -> None:
        logs.set_up(telemetry.log_level, telemetry.log_format)
        self._coordinator = Coordinator(experts_per_layer, groups, ask_group, next_epoch())
        self._coordinator.start(start_timeout_s)

    def membership(self) -> Membership:
        """See `Coordinator`."""
        return self._coordinator.membership()

    def pid(self) -> int:
        """Its process id, for drills."""
        return os.getpid()

    def check_health(self) -> None:
        """Serve restarts a coordinator whose loop is stuck."""
        age_s = self._coordinator.progress_age_s()
        if age_s > 60:
            raise Unavailable(f"the coordinator's loop made no progress for {age_s:.0f} s")
