"""`ray up` on three hosts, with deploy/ray as it stands: verify, deploy, changes under load, a host that loses power,
`ray down`. The tests are steps, and need those before them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from cluster.config import EMBEDDED_MODEL
from tests.cluster.hosts import ROOT, Host, Hosts, missing
from tests.documents import block

WHY_NOT = missing()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=f"hosts of namespaces: {WHY_NOT}; `ray up` was NOT tested"),
    pytest.mark.timeout(600),
]
SERVE = ROOT / "deploy/ray/serve-config.yaml"
RAY = "10.77.0.11:6379"
CLIENTS = "10.77.0.11:9000"
LOADED_S = 25.0


class Cluster:
    """The hosts, and the commands of whoever looks after them."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.head, self.workers = hosts, hosts.hosts[0], hosts.hosts[1:]

    @property
    def token(self) -> str:
        """Ray's, once there is one."""
        return (self.hosts.home / ".ray" / "auth_token").read_text()

    def documented(self, begins: str, but: tuple[str, ...] = ()) -> list[str]:
        """Runs a block of deploy/ray/README.md on the laptop as it stands there, but for the yes that Ray asks people
        for; what each command printed. Those that begin with ``but`` are left out."""
        printed = []
        for command in block("deploy/ray/README.md", begins).commands:
            if not (but and command.startswith(but)):
                shell = re.sub("^ray (up|down)", r"ray \1 -y", command.replace("HEAD:9000", CLIENTS))
                done = self.hosts.run("sh", "-c", shell, timeout_s=240, check=False)
                assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                printed.append(done.stdout)
        return printed

    def on_head(self, command: str, timeout_s: float = 240.0, check: bool = True) -> str:
        """Standard output of a command on the head."""
        done = self.hosts.ssh(self.head, f"export RAY_AUTH_MODE=token; {command}", timeout_s=timeout_s, check=False)
        assert not check or done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def alive(self) -> list[str]:
        """Host names of the nodes that Ray thinks are alive."""
        code = (
            "import ray; ray.init('auto', log_to_driver=False, logging_level='error'); "
            "print('ALIVE', *sorted(n['NodeManagerHostname'] for n in ray.nodes() if n['Alive']))"
        )
        lines = self.on_head(f'python -c "{code}" 2>/dev/null', check=False).splitlines()
        return next((line.split()[1:] for line in lines if line.startswith("ALIVE")), [])

    def wait_for(self, names: list[str], seconds: float) -> None:
        limit = time.monotonic() + seconds
        while (found := self.alive()) != names:
            assert time.monotonic() < limit, f"alive: {found}, wanted: {names}"
            time.sleep(2)

    def deploy(self, config: dict[str, Any]) -> None:
        text = yaml.safe_dump(config)
        self.on_head(f"cat > /tmp/serve.yaml <<'END'\n{text}\nEND\nserve deploy /tmp/serve.yaml")

    def status(self) -> dict[str, Any] | None:
        """Of the router, as the laptop sees it; None while nobody answers."""
        done = self.hosts.run("expertmesh", "status", "--server", CLIENTS, "--json", check=False)
        if done.returncode != 0:
            return None
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    def wait_for_groups(self, healthy: int, seconds: float) -> dict[str, Any]:
        limit = time.monotonic() + seconds
        while True:
            status = self.status()
            if status is not None and sum(group["healthy"] for group in status["groups"]) == healthy:
                return status
            assert time.monotonic() < limit, status
            time.sleep(2)

    def load(self, seconds: float = LOADED_S) -> subprocess.Popen[str]:
        """Load from the laptop; returns when it has begun."""
        process = subprocess.Popen(
            self.hosts.command(sys.executable, "-m", "tests.cluster.load", CLIENTS, str(seconds)),
            env=self.hosts.environ(),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip() == "load":
                return process
        raise AssertionError("the load did not begin")


def report_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    print({key: value for key, value in report.items() if key not in ("before", "after")})
    assert report["failed"] == []
    assert report["mismatched"] == 0
    assert report["requests"] > 10
    return report


def changed(report: dict[str, Any]) -> set[str]:
    return {name for name in report["before"] if report["after"].get(name) != report["before"][name]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Hosts(3, EMBEDDED_MODEL) as hosts:
        made = Cluster(hosts)
        made.documented("ray get-auth-token")
        made.wait_for(["head", "worker-1", "worker-2"], 90)
        yield made


@pytest.fixture(scope="module")
def served(cluster: Cluster) -> dict[str, Any]:
    cluster.documented("ray rsync-up")
    cluster.wait_for_groups(2, 120)
    config: dict[str, Any] = yaml.safe_load(SERVE.read_text())
    return config


@pytest.mark.parametrize(
    "transport", ["grpc", pytest.param("gloo", marks=pytest.mark.full), pytest.param("auto", marks=pytest.mark.full)]
)
def test_it_is_exact_across_hosts(cluster: Cluster, transport: str) -> None:
    out = cluster.on_head(
        f"expertmesh verify --address {RAY} --groups 2 --prompts 4 --tokens 8 --transport {transport} --json"
    )
    (run,) = json.loads(out.splitlines()[-1])["runs"]
    assert run["ok"]
    router, *groups = run["hosts"]
    assert set(groups) != {router}, "some link crosses hosts"
    # Shared memory does not reach another host, and nobody thinks that it does.
    wanted = [("shm" if host == router else "grpc") if transport == "auto" else transport for host in groups]
    assert run["links"] == wanted


@pytest.mark.full
def test_the_doctor_sees_every_host(cluster: Cluster) -> None:
    (table,) = cluster.documented("ray exec deploy/ray/local.yaml 'RAY_AUTH_MODE=token expertmesh doctor")
    assert all(host in table for host in ("head", "worker-1", "worker-2"))
    out = cluster.on_head(f"expertmesh doctor --address {RAY} --json", check=False)
    findings = json.loads(out.splitlines()[-1])["findings"]
    assert {finding["host"] for finding in findings} >= {"head", "worker-1", "worker-2"}
    assert {finding["state"] for finding in findings if finding["check"] == "clock_skew"} == {"ok"}
    assert [finding["state"] for finding in findings if finding["check"] == "ray_token"] == ["ok"]


@pytest.mark.full
def test_strangers_do_not_reach_ray(cluster: Cluster) -> None:
    code, token = f"import ray; ray.init('{RAY}', logging_level='error')", cluster.token
    (cluster.hosts.home / ".ray" / "auth_token").write_text("f" * 64)
    try:
        done = cluster.hosts.run(sys.executable, "-c", code, check=False, RAY_AUTH_MODE="token", timeout_s=90)
    finally:
        (cluster.hosts.home / ".ray" / "auth_token").write_text(token)
    assert done.returncode != 0
    assert "auth" in done.stderr.lower()


def test_serve_config_puts_it_on_the_cluster(cluster: Cluster, served: dict[str, Any]) -> None:
    status = cluster.wait_for_groups(2, 60)
    assert status["router"]["host"] == "head"
    assert {group["process"]["host"] for group in status["groups"]} == {"worker-1", "worker-2"}
    for group in status["groups"]:
        assert group["transport"] == "grpc"
        assert "shm" in group["link"]["why"]
    text, shown = cluster.documented("expertmesh generate", but=("ray dashboard",))  # which is there until Ctrl-C
    assert len(text.split()) > 8
    assert "grpc" in shown


def _change(served: dict[str, Any], name: str, **settings: Any) -> None:
    """Of one application's configuration; the file has one for all, which YAML makes one object of."""
    arguments = next(item["args"] for item in served["applications"] if item["name"] == name)
    arguments["config"] = {**arguments["config"], **settings}


@pytest.mark.full
def test_one_group_is_changed_under_load(cluster: Cluster, served: dict[str, Any]) -> None:
    load = cluster.load()
    _change(served, "experts-0", drain_s=25.0)
    cluster.deploy(served)
    report = report_of(load)
    cluster.wait_for_groups(2, 90)
    assert changed(report) == {"experts-0"}


@pytest.mark.full
def test_the_router_is_changed_under_load(cluster: Cluster, served: dict[str, Any]) -> None:
    """There is one, so streams wait for the new one, and go on there."""
    load = cluster.load(40)
    _change(served, "expertmesh", drain_s=26.0)
    cluster.deploy(served)
    report = report_of(load)
    assert report["resumed"] > 0
    assert changed(report) == {"router"}


def _holder(cluster: Cluster) -> Host:
    """A worker whose loss takes a group with it."""
    status = cluster.wait_for_groups(2, 60)
    name = status["groups"][1]["process"]["host"]
    return next(host for host in cluster.workers if host.name == name)


def test_a_host_loses_power_under_load(cluster: Cluster, served: dict[str, Any]) -> None:
    victim = _holder(cluster)
    load = cluster.load(40)
    time.sleep(5)
    victim.power_off()
    report = report_of(load)
    assert victim.name not in str(report["after"].values()) or len(cluster.alive()) == 2
    # Ray notices after a while, and Serve starts the group on the host that is left.
    status = cluster.wait_for_groups(2, 120)
    assert victim.name not in {group["process"]["host"] for group in status["groups"]}


def test_it_is_taken_down(cluster: Cluster) -> None:
    for worker in cluster.workers:
        cluster.hosts.ssh(worker, "ray stop --force", check=False)
    cluster.documented("ray exec deploy/ray/local.yaml 'RAY_AUTH_MODE=token serve shutdown")
    left = {process.name() for host in cluster.hosts.hosts for process in host.processes()}
    assert not {name for name in left if "raylet" in name or "gcs_server" in name}, left
