"""Which host a group prefers."""

from __future__ import annotations

from typing import Any

from cluster.placement.hosts import preferred_host


def node(number: int, role: str = "worker", alive: bool = True) -> dict[str, Any]:
    return {"NodeID": f"n{number}", "Alive": alive, "Labels": {"role": role, "ray.io/node-id": f"n{number}"}}


def test_groups_prefer_different_hosts_and_may_go_elsewhere() -> None:
    nodes = [node(0, "head"), node(1), node(2), node(3, alive=False)]
    preferred = [preferred_host(group, {"role": "worker"}, nodes) for group in range(3)]
    hosts = [options["label_selector"]["ray.io/node-id"] for options in preferred]
    assert hosts == ["n1", "n2", "n1"]
    for options in preferred:
        assert options["label_selector"]["role"] == "worker"
        assert options["fallback_strategy"] == [{"label_selector": {"role": "worker"}}]
    hosts = [preferred_host(group, {}, nodes)["label_selector"]["ray.io/node-id"] for group in range(3)]
    assert hosts == ["n0", "n1", "n2"]


def test_nothing_is_said_where_there_is_no_choice() -> None:
    assert preferred_host(0, {"role": "worker"}, [node(0, "head"), node(1)]) == {}
    assert preferred_host(0, {"role": "!head"}, [node(0, "head"), node(1), node(2)]) == {}
    assert preferred_host(0, {}, []) == {}
