"""Traces are found as soon as they are asked for, whoever writes its spans first."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from cluster.commands import trace as commands
from cluster.errors import InvalidArgument
from cluster.telemetry.store import SUFFIX
from cluster.telemetry.traces import CLIENT, REQUEST

TRACE = "ab" * 16


def write(store: Path, name: str, span: str, parent: str = "") -> None:
    plain = {"trace": TRACE, "span": span, "name": name, "kind": 3, "start": 1, "end": 9, "attributes": {}}
    batch = {"resource": {"service.name": name}, "spans": [plain | ({"parent": parent} if parent else {})]}
    (store / f"{span}{SUFFIX}").write_text(json.dumps(batch) + "\n")


def test_a_server_that_writes_later_than_its_client_is_waited_for(tmp_path: Path) -> None:
    write(tmp_path, CLIENT, "01")
    later = threading.Timer(0.5, write, (tmp_path, REQUEST, "02", "01"))
    later.start()
    try:
        assert [span.name for span in commands._find(TRACE[:9], tmp_path).spans] == [CLIENT, REQUEST]
    finally:
        later.join()


def test_what_a_client_alone_wrote_is_shown_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "PATIENCE_S", 0.3)
    write(tmp_path, CLIENT, "01")
    assert [span.name for span in commands._find(TRACE, tmp_path).spans] == [CLIENT]
    with pytest.raises(InvalidArgument, match="no such trace"):
        commands._find("cd", tmp_path)


def test_a_trace_of_something_else_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "PATIENCE_S", 60.0)
    write(tmp_path, "moe.step", "01")
    assert commands._find(TRACE, tmp_path).root.name == "moe.step"
