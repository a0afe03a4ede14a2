"""Serve applications: running them, waiting for them, removing them, and what they failed with."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from cluster import errors
from cluster.core import Deadline, GroupId
from cluster.errors import ExpertMeshError, InternalError, Unavailable

APP = "expertmesh"
GROUP_APP_PREFIX = "experts-"
REMOVE_TIMEOUT_S = 60.0


def group_app(group: GroupId) -> str:
    """Name of the Serve application of a group."""
    return f"{GROUP_APP_PREFIX}{group}"


def applications() -> list[str]:
    """Names of ExpertMesh's applications on the Ray cluster that the process is connected to."""
    return sorted(name for name in serve.status().applications if name == APP or name.startswith(GROUP_APP_PREFIX))


def group_applications() -> list[GroupId]:
    """Groups whose applications are there, running or not."""
    numbers = (name.removeprefix(GROUP_APP_PREFIX) for name in applications() if name != APP)
    return sorted(int(number) for number in numbers if number.isdecimal())


def run_applications(targets: Sequence[serve.RunTarget]) -> None:
    """Runs applications and waits; a failed constructor becomes the error that it raised."""
    told = ""
    try:
        serve.run_many(targets)
    except (RuntimeError, ray.exceptions.RayError, TimeoutError) as exc:
        # What Serve raises may name the deployment alone; then only its status says what was wrong with it.
        with contextlib.suppress(RuntimeError, ray.exceptions.RayError, TimeoutError):
            running = serve.status().applications
            told = _told(running[target.name] for target in targets if target.name in running)
        raise _origin(f"{told}\n{exc}") from exc


def run_application(application: serve.Application, name: str, timeout_s: float) -> None:
    """Runs one without a route, from within another one.

    Raises:
        Unavailable: it did not run within ``timeout_s``.
        ExpertMeshError: what its constructor failed with.
    """
    try:
        target = serve.RunTarget(application, name=name, route_prefix=None)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        deadline = Deadline.after(timeout_s)
        while True:
            found = serve.status().applications.get(name)
            if found is not None and found.status == ApplicationStatus.RUNNING:
                return
            if found is not None and found.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise _origin(_told([found]))
            if deadline.expired():
                raise Unavailable(f"application {name} does not run after {timeout_s:g} s")
            time.sleep(0.2)
    except (RuntimeError, ray.exceptions.RayError, TimeoutError) as exc:
        raise _origin(str(exc)) from exc


def remove_applications(names: Sequence[str]) -> None:
    """Deletes applications and waits until they are gone.

    Raises:
        Unavailable: some are still there after a minute.
    """
    for name in names:
        serve.delete(name, _blocking=False)
    deadline = Deadline.after(REMOVE_TIMEOUT_S)
    while set(names) & set(serve.status().applications):
        if deadline.expired():
            raise Unavailable(f"Serve did not remove the applications within {REMOVE_TIMEOUT_S:g} s")
        time.sleep(0.1)


def _told(found: Iterable[Any]) -> str:
    """What Serve says of applications and their deployments."""
    return "\n".join(text for each in found for text in (each.message, *(d.message for d in each.deployments.values())))


def _origin(text: str) -> ExpertMeshError:
    """The typed error inside a traceback that Serve reports as text."""
    kinds: Mapping[str, Any] = vars(errors)
    for name, message in reversed(re.findall(r"cluster\.errors\.(\w+): (.*)", text)):
        kind = kinds.get(name)
        if isinstance(kind, type) and issubclass(kind, ExpertMeshError):
            error: ExpertMeshError = ExpertMeshError.__new__(kind)
            Exception.__init__(error, message.strip())
            return error
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return InternalError(f"a process failed to start: {lines[-1] if lines else 'no reason was given'}")
