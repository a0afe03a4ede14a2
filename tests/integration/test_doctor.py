"""What the doctor says of this machine, of planted ones, and of a configuration's ports."""

from __future__ import annotations

import resource
import socket
from collections import Counter
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.doctor import machine
from cluster.doctor.findings import Finding
from cluster.doctor.ports import check_ports, check_ray
from cluster.settings import SecurityConfig
from tests.pki import Pki


def states(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.state for finding in findings}


def test_this_machine_is_examined_whole() -> None:
    findings = machine.check_machine()
    found = states(findings)
    assert found["python"] == found["packages"] == "ok", findings
    wanted = {"cores", "memory", "shared_memory", "huge_pages", "numa", "gpus", "nccl", "open_files", "disk", "clock"}
    assert wanted <= set(found)
    assert all(finding.remedy for finding in findings if finding.state in ("warn", "fail"))
    assert not any("could not be checked" in finding.found for finding in findings), findings


def test_a_check_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Counter[str]:
        raise OSError("no such thing")

    monkeypatch.setattr(machine.psutil, "virtual_memory", broken)
    found = states(machine.check_machine())
    assert found["memory"] == "skip"
    assert found["python"] == "ok"


def test_missing_packages_and_few_files_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine.importlib.metadata, "requires", lambda _: ["ray>=999", "nosuchthing", "pytest; extra=='x'"]
    )
    (packages,) = machine._packages()
    assert packages.state == "fail"
    assert "nosuchthing is missing" in packages.found
    assert "is not >=999" in packages.found
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    (files,) = machine._open_files(soft)
    assert files.state == "warn"


def test_certificates_that_end_are_found(tmp_path: Path) -> None:
    cert, key = Pki(tmp_path, "mesh").issue("127.0.0.1")
    good = SecurityConfig(cert=cert, key=key)
    assert states(list(machine._certificates(good))) == {"certificates": "ok"}
    found = states(machine.check_machine(SecurityConfig(cert=cert, key=cert)))
    assert found["certificates"] == "fail"


def test_ports_and_what_is_open_to_the_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = states(list(check_ports(load_config(flags={"listen": f"127.0.0.1:{port}"}, environ={}))))
        assert found["ports"] == "fail"
    findings = list(
        check_ports(load_config(flags={"listen": "0.0.0.0:0", "data_plane": {"bind": "0.0.0.0"}}, environ={}))
    )
    assert sum(finding.check == "exposure" for finding in findings) == 3
    served = load_config(flags={"front_door": "serve", "telemetry": {"metrics_listen": "0.0.0.0:9464"}}, environ={})
    assert sum(finding.check == "exposure" for finding in check_ports(served)) == 2
    assert not any(finding.check == "exposure" for finding in check_ports(load_config(environ={})))
    assert states(list(check_ray("10.0.0.1:6379"))).get("ray_token") in ("ok", "warn")
