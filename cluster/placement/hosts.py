"""Which host a group prefers: copies of an expert on one host die together. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.core import GroupId

_NODE_LABEL = "ray.io/node-id"


def preferred_host(group: GroupId, wanted: Mapping[str, str], nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ray's actor options for a group's process, of ``nodes`` as Ray lists them: groups take hosts in turn, and another
    one where theirs is gone. ``wanted`` are labels that the host must have in any case. Nothing where there is no
    choice, or where labels say more than equality."""
    if any(not value.replace("-", "").replace("_", "").replace(".", "").isalnum() for value in wanted.values()):
        return {}
    fit = sorted(
        node["NodeID"]
        for node in nodes
        if node["Alive"] and all(node.get("Labels", {}).get(name) == value for name, value in wanted.items())
    )
    if len(fit) < 2:
        return {}
    other = dict(wanted) or {_NODE_LABEL: "!none"}
    return {
        "label_selector": {**wanted, _NODE_LABEL: fit[group % len(fit)]},
        "fallback_strategy": [{"label_selector": other}],
    }
