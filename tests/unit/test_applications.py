"""What a process failed with while it started, from what Serve makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.control import applications
from cluster.errors import ConfigError, InternalError

TRACEBACK = """The deployment failed to start 3 times in a row.
  File "router.py", line 133, in __init__
cluster.errors.ConfigError: engine.kv_cache_bytes: got 1; one block of 16 tokens (engine.block_size) takes 6144
"""


def failing(monkeypatch: pytest.MonkeyPatch, raised: str, told: str | None) -> None:
    """Serve, whose application "expertmesh" fails: with an exception that says so much, and a deployment's message."""

    def run_many(_targets: object) -> None:
        raise RuntimeError(raised)

    def status() -> SimpleNamespace:
        if told is None:
            raise RuntimeError("Serve is not there")
        deployments = {"router": SimpleNamespace(message=told)}
        one = SimpleNamespace(message="Failed to update the deployments ['router'].", deployments=deployments)
        return SimpleNamespace(applications={"expertmesh": one})

    monkeypatch.setattr(applications.serve, "run_many", run_many)
    monkeypatch.setattr(applications.serve, "status", status)


TARGETS = [SimpleNamespace(name="expertmesh"), SimpleNamespace(name="experts-0")]


@pytest.mark.parametrize(("raised", "told"), [("no more than this", TRACEBACK), (TRACEBACK, ""), (TRACEBACK, None)])
def test_the_error_is_the_constructors(monkeypatch: pytest.MonkeyPatch, raised: str, told: str | None) -> None:
    failing(monkeypatch, raised, told)
    with pytest.raises(ConfigError, match=r"^engine.kv_cache_bytes: got 1; one block .* takes 6144$"):
        applications.run_applications(TARGETS)  # type: ignore[arg-type]


def test_without_a_typed_error_the_last_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "it failed.\n", "")
    with pytest.raises(InternalError, match="it failed"):
        applications.run_applications(TARGETS)  # type: ignore[arg-type]
