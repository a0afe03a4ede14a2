"""Unit tests start no Ray and open no network socket."""

from __future__ import annotations

import socket

import pytest
import ray


@pytest.fixture(autouse=True)
def _no_ray_and_no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("unit tests start no Ray and open no sockets")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "bind", refuse)
