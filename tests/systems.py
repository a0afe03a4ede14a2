"""Whole systems in this process, without Ray: what unit and integration tests are built with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.api.router import Router
from cluster.config import Config, load_config
from cluster.core import Deadline, GroupInfo, Membership
from cluster.experts.group import ExpertGroup
from cluster.placement.planner import plan_blocks, table_from_groups
from cluster.transport.base import Transport
from cluster.transport.inproc import InprocTransport
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton

SpoilLink = Callable[[Transport], Transport]


def experts_per_layer(path: Path) -> list[int]:
    """Routed experts of each MoE layer of a checkpoint."""
    checkpoint = Checkpoint(path)
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))
    return [layer.num_experts for layer in weights.skeleton.moe_layers]


def config_for(path: Path, **flags: object) -> Config:
    """A configuration that reads no environment."""
    quiet = {"traces": "off", "metrics_listen": "off"}
    base = load_config(flags={"model": str(path), "dtype": "fp32", "telemetry": quiet, **flags}, environ={})
    return dataclasses.replace(base, data_plane=dataclasses.replace(base.data_plane, secret="test", group_wait_s=2.0))


@contextmanager
def in_process_router(
    path: Path, num_groups: int = 2, spoil: SpoilLink = lambda link: link, **flags: object
) -> Iterator[Router]:
    """A router with its groups in this process; ``spoil`` may wrap each link."""
    config = config_for(path, verify=True, **flags)
    per_layer = experts_per_layer(path)
    groups = {
        i: ExpertGroup(i, held, config, threads=1, listen=False)
        for i, held in enumerate(plan_blocks(per_layer, num_groups))
    }

    def membership() -> Membership:
        infos = {i: group.info() for i, group in groups.items()}
        return Membership(table_from_groups(1, 1, per_layer, infos.values()), infos)

    def connect(info: GroupInfo, _deadline: Deadline) -> Transport:
        return spoil(InprocTransport(info.group, groups[info.group].host))

    router = Router(config, membership, threads=1, local_links=connect)
    try:
        yield router
    finally:
        router.close()
        for group in groups.values():
            group.close()


@contextmanager
def linked_router(
    path: Path, transports: str, num_groups: int, **flags: object
) -> Iterator[tuple[Router, list[ExpertGroup]]]:
    """A router and groups that have only their data plane in common, though they share this process."""
    config = config_for(path, verify=True, groups=num_groups, data_plane={"transport": transports}, **flags)
    per_layer = experts_per_layer(path)
    groups = [ExpertGroup(i, held, config, threads=1) for i, held in enumerate(plan_blocks(per_layer, num_groups))]

    def membership() -> Membership:
        infos = {group.group: group.info() for group in groups}
        return Membership(table_from_groups(1, 1, per_layer, infos.values()), infos)

    try:
        router = Router(config, membership, threads=1)
        try:
            yield router, groups
        finally:
            router.close()
    finally:
        for group in groups:
            group.close()
