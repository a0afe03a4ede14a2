"""The checks of a machine on every host of a Ray cluster, and how far the hosts' clocks are apart."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.doctor.findings import FAIL, OK, WARN, Finding
from cluster.doctor.machine import check_machine
from cluster.settings import SecurityConfig

HOST_TIMEOUT_S = 60.0
SKEW_S = 0.05
"""Spans of a request come from several hosts: with clocks further apart a child may seem to begin before its parent."""


def check_hosts(security: SecurityConfig) -> list[Finding]:
    """Findings with the names of their hosts. The process is connected to the cluster."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    findings = [Finding("hosts", OK, f"{len(nodes)} alive")]
    dead = len(ray.nodes()) - len(nodes)
    if dead:
        findings.append(Finding("hosts", WARN, f"{dead} were there and are dead", "see `ray status`"))
    for node in nodes:
        name = node["NodeManagerHostname"]
        try:
            found = _ask(node["NodeID"], security)
        except (ray.exceptions.RayError, TimeoutError) as exc:
            text = f"does not answer: {type(exc).__name__}"
            findings.append(Finding("hosts", FAIL, text, "see its raylet's log; is the project installed there?", name))
            continue
        findings += [dataclasses.replace(finding, host=name) for finding in found]
    return findings


def _now() -> float:
    return time.time()


def _ask(node: str, security: SecurityConfig) -> list[Finding]:
    """The host's own findings, and its clock against ours: the middle of the shortest of some round trips."""
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": here, "max_retries": 0}
    remote: Any = ray.remote(**options)
    found: list[Finding] = ray.get(remote(check_machine).remote(security), timeout=HOST_TIMEOUT_S)
    now = remote(_now)
    trips = []
    for _ in range(5):
        sent_s = time.time()
        there_s = ray.get(now.remote(), timeout=HOST_TIMEOUT_S)
        back_s = time.time()
        trips.append((back_s - sent_s, there_s - (sent_s + back_s) / 2))
    round_s, ahead_s = min(trips)
    text = f"{1e3 * ahead_s:+.1f} ms against this host, give or take {5e2 * round_s:.1f}"
    apart = abs(ahead_s) - round_s / 2 > SKEW_S
    found.append(
        Finding("clock_skew", WARN if apart else OK, text, "synchronise the hosts' clocks (chrony)" if apart else "")
    )
    return found
