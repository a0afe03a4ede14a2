"""What `serve deploy` builds applications with (``import_path`` of deploy/ray/serve-config.yaml): the same ones as
`expertmesh serve`, declared one by one, so that changing one restarts no other.

``config`` has the keys of the configuration file and must say the same in all applications of one model. The cluster
secret is made by whichever is built first and kept in Ray's key-value store.
"""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from cluster.app import GroupBuilder, hosts_alive, router_application
from cluster.config import Config, config_of
from cluster.errors import ConfigError
from cluster.plan import Plan, make_plan

_SECRET_KEY = b"expertmesh:secret"
_ACTOR_KEYS = ("label_selector", "fallback_strategy", "resources", "num_gpus", "num_cpus", "memory")


def group(args: dict[str, Any]) -> serve.Application:
    """An expert group. Arguments: ``group`` (its number, from 0), ``config`` and, for where it runs, ``actor`` with any
    of Ray's label_selector, fallback_strategy, resources, num_gpus, num_cpus and memory. Groups without GPUs prefer
    different hosts, where that says nothing else.

    Raises:
        ConfigError: names the argument or key that is wrong.
    """
    plan, actor = _read(args, "group")
    number = args.get("group")
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(plan.holdings):
        raise ConfigError(f"group: got {number!r}; must be a number from 0 to {len(plan.holdings) - 1}, below groups")
    if plan.one_process:
        raise ConfigError("group: there are none: config says that they are in the router's process")
    return _builder(plan, actor)(number, plan.holdings[number])


def router(args: dict[str, Any]) -> serve.Application:
    """Routers and coordinator. Arguments: ``config``, and as of `group` ``actor``, for the routers, and
    ``group_actor``, for groups that `expertmesh scale` adds.

    Raises:
        ConfigError: names the argument or key that is wrong.
    """
    plan, actor = _read(args, "router")
    return router_application(plan, _gpus(plan, actor), hosts_alive(), actor, _actor(args, "group_actor"))


def _builder(plan: Plan, actor: Mapping[str, Any]) -> GroupBuilder:
    return GroupBuilder(plan, _gpus(plan, actor), hosts_alive(), actor)


def _gpus(plan: Plan, actor: Mapping[str, Any]) -> float:
    """Of each process. Applications are built when hosts may not be there yet, so what is asked for counts, and only
    with ``device: auto`` what the cluster has now."""
    if "num_gpus" in actor:
        return float(actor["num_gpus"])
    wants = plan.config.device == "cuda" or (plan.config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    return plan.config.gpu_share if wants else 0.0


def _read(args: Mapping[str, Any], kind: str) -> tuple[Plan, dict[str, Any]]:
    known = ("config", "actor", "group") if kind == "group" else ("config", "actor", "group_actor")
    for name in args:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            raise ConfigError(f"args: unknown argument {name!r}{hint}")
    given, actor = args.get("config") or {}, _actor(args, "actor")
    if not isinstance(given, Mapping):
        raise ConfigError(f"config: got {given!r}; must be a section with keys")
    # This machine's EXPERTMESH_* are not read: which host builds an application is chance.
    config = config_of(given)
    if config.data_plane.secret:
        raise ConfigError(
            "data_plane.secret: Serve logs arguments, so leave it out: one is made, and kept in Ray's store"
        )
    if config.model and not Path(config.model).is_absolute():
        raise ConfigError(f"model: got {config.model!r}; must be an absolute path that is there on every host")
    return make_plan(_with_secret(config), elsewhere=True), actor


def _actor(args: Mapping[str, Any], name: str) -> dict[str, Any]:
    given = args.get(name) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}: got {given!r}; must be a section with keys")
    for key in given:
        if key not in _ACTOR_KEYS:
            raise ConfigError(f"{name}: unknown key {key!r}; known keys: {', '.join(_ACTOR_KEYS)}")
    return dict(given)


def _with_secret(config: Config) -> Config:
    _internal_kv_put(_SECRET_KEY, secrets.token_hex(16).encode(), overwrite=False)
    kept = _internal_kv_get(_SECRET_KEY)
    if not kept:
        raise ConfigError("data_plane.secret: Ray's key-value store does not keep it")
    data_plane = dataclasses.replace(config.data_plane, secret=kept.decode())
    return dataclasses.replace(config, data_plane=data_plane)
