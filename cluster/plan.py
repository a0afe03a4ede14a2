"""What a deployment will be, checked before anything is started."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.api.tokens import TokenFile
from cluster.config import Config
from cluster.errors import ConfigError, InvalidArgument
from cluster.placement.layout import holdings_from_slots
from cluster.placement.planner import Holdings, plan_copies
from cluster.placement.windows import read_plan
from cluster.transport.credentials import check_files
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.dtypes import resolve_dtype
from cluster.weights.footprint import Footprint, footprints
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton


@dataclass(frozen=True, slots=True)
class Plan:
    """Configuration, which group holds what, and bytes of every process."""

    config: Config
    experts_per_layer: tuple[int, ...]
    holdings: tuple[Holdings, ...]
    processes: tuple[Footprint, ...]

    @property
    def one_process(self) -> bool:
        """The groups live in the router's process."""
        return self.config.groups == 0 or "inproc" in self.config.transports()


def make_plan(config: Config, elsewhere: bool = False) -> Plan:
    """Opens the checkpoint, refuses what cannot be served, places experts and adds up bytes. Loads no weights.
    ``elsewhere``: this machine may be another one than those that will serve.

    Raises:
        CheckpointError, UnsupportedModel, ConfigError: with the reason in one line.
    """
    # Ray's workers have another working directory than the command that was given a relative path.
    paths = ("cert", "key", "ca", "client_ca", "tokens")
    given = {name: value for name in paths if (value := getattr(config.security, name))}
    resolved: dict[str, Any] = {name: str(Path(value).resolve()) for name, value in given.items()}
    security = dataclasses.replace(config.security, **resolved)
    config = dataclasses.replace(config, model=str(Path(config.model).resolve()), security=security)
    if not config.data_plane.secret:
        data_plane = dataclasses.replace(config.data_plane, secret=secrets.token_hex(16))
        config = dataclasses.replace(config, data_plane=data_plane)
    if config.device == "cuda" and not torch.cuda.is_available() and not (config.address or elsewhere):
        raise ConfigError("device: got 'cuda'; torch finds no GPU on this machine")
    check_files(config.security)
    if config.security.tokens:
        TokenFile(config.security.tokens)
    checkpoint = Checkpoint(config.model)
    dtype = resolve_dtype(config.dtype, checkpoint.dtype, torch.cuda.is_available() and config.device != "cpu")
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, dtype))
    experts_per_layer = tuple(layer.num_experts for layer in weights.skeleton.moe_layers)
    span = config.placement.group_range()
    most = min(experts_per_layer)
    if span is not None and span[1] > most:
        raise ConfigError(
            f"placement.autoscale: got {config.placement.autoscale!r}; must be at most {most} groups, the experts of a "
            "layer"
        )
    holdings = _holdings(config, experts_per_layer)
    return _with_sizes(Plan(config, experts_per_layer, holdings, ()), weights, dtype)


def _holdings(config: Config, experts_per_layer: tuple[int, ...]) -> tuple[Holdings, ...]:
    """Which group holds what at the start."""
    groups = max(1, config.groups)
    if not config.placement.plan:
        return tuple(plan_copies(experts_per_layer, groups, config.copies))
    if len(set(experts_per_layer)) > 1:
        raise ConfigError("placement.plan: layers of this model have different numbers of experts")
    try:
        slots_LS = read_plan(Path(config.placement.plan), len(experts_per_layer), experts_per_layer[0])
    except InvalidArgument as exc:
        raise ConfigError(f"placement.plan: {exc}") from exc
    if slots_LS.shape[1] % groups:
        raise ConfigError(f"placement.plan: its {slots_LS.shape[1]} slots cannot be divided among {groups} groups")
    held = holdings_from_slots(slots_LS, groups)
    for layer, experts in enumerate(experts_per_layer):
        lacking = set(range(experts)) - {expert for holdings in held for expert in holdings[layer]}
        if lacking:
            raise ConfigError(f"placement.plan: no group holds expert {min(lacking)} of MoE layer {layer}")
    return tuple(held)


def _with_sizes(plan: Plan, weights: WeightMap, dtype: torch.dtype) -> Plan:
    """The plan with bytes of its processes."""
    config = plan.config
    bits = {"int8": 8, "bf16": 16}.get(config.expert_dtype, 8 * dtype.itemsize)
    cache, budget = config.engine.kv_cache_bytes, config.memory_bytes()
    found = footprints(weights, plan.holdings, dtype, cache, plan.one_process, bits, budget)
    return dataclasses.replace(plan, processes=tuple(found[:1] * (config.routers - 1) + found))
