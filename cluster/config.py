"""One frozen chain of dataclasses, and its one reader: defaults < YAML file < EXPERTMESH_* environment < flags.

Unknown keys are errors that name the key and the nearest known one. This is the only file that reads environment
variables. Defaults of command-line flags come from here.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import ConfigError
from cluster.settings import (
    LOOPBACK,
    ClientSecurity,
    DataPlaneConfig,
    EngineConfig,
    FaultsConfig,
    PlacementConfig,
    SecurityConfig,
    TelemetryConfig,
)

EMBEDDED_MODEL = Path(__file__).parent / "models" / "embedded"
DTYPES = ("auto", "fp32", "bf16", "fp16")
COMPUTE_ENVIRONMENT = {
    # OpenMP threads that spin for long after a parallel region hold the core that another thread or process needs.
    "GOMP_SPINCOUNT": "20000",
    # Weights in huge pages: a product that reads them once waits less for address translation (10 % here).
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Of every process that computes; libraries read it when they are loaded."""
EXPERT_DTYPES = ("auto", "fp32", "bf16", "int8")
_CLIENT_PREFIX = "EXPERTMESH_CLIENT_"
TRANSPORTS = ("auto", "shm", "grpc", "nccl", "gloo", "inproc")


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that can be set."""

    model: str = str(EMBEDDED_MODEL)
    """Checkpoint directory in the Hugging Face layout."""
    groups: int = 2
    """Expert groups; 0 keeps all experts in the router's process."""
    routers: int = 1
    """Routers, each with the trunk and a client port of its own: listen, and on the same host the ports after it."""
    copies: int = 1
    """Groups that hold each expert: with 2, any one group may be gone and nothing is missing."""
    dtype: str = "auto"
    """auto is the checkpoint's dtype on GPUs and fp32 on CPUs."""
    expert_dtype: str = "auto"
    """Of expert weights: auto (the served dtype, exact); fp32, bf16 or int8 (on CPUs that serve fp32; other weights
    than the checkpoint's, so answers say that they are not exact)."""
    expert_memory: str = "all"
    """Of a group, for experts in memory: all, or bytes such as 512M or 4G (powers of 1024). What does not fit is loaded
    when it is called for."""
    predict_experts: bool = True
    """Groups with a budget are told which experts the next layer will probably want."""
    expert_reads: str = "mapped"
    """How groups with a budget read experts: mapped leaves it to the system's page cache what else stays in memory;
    direct goes past it, so that what exceeds the budget is on the disk and nowhere else."""
    device: str = "auto"
    """auto takes GPUs when the cluster has them."""
    gpu_share: float = 1.0
    """Of a GPU, that each router and each group books; with less than 1 several processes share one."""
    listen: str = "127.0.0.1:9000"
    """Client port of the router."""
    front_door: str = "router"
    """router: its own gRPC server; serve: Ray Serve's gRPC ingress."""
    address: str = ""
    """Ray cluster to join; empty starts a local one."""
    threads: int = 0
    """Compute threads of each process; 0 divides the cores of the machine."""
    numa: str = "auto"
    """auto binds processes to NUMA nodes where there are several; off; strict: and fails if memory lands elsewhere."""
    start_timeout_s: float = 600.0
    """How long router and coordinator wait for the groups to load."""
    drain_s: float = 30.0
    """How long SIGTERM lets running requests finish."""
    warm_up: bool = True
    """Everything is run once before a process says that it is ready. Off only to see what that is worth; then nothing
    is predicted either."""
    verify: bool = False
    """Lets clients ask for full logits."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    data_plane: DataPlaneConfig = field(default_factory=DataPlaneConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("expert_dtype", self.expert_dtype, EXPERT_DTYPES)
        _one_of("expert_reads", self.expert_reads, ("mapped", "direct"))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("front_door", self.front_door, ("router", "serve"))
        _one_of("numa", self.numa, ("auto", "off", "strict"))
        self._check_transport()
        self.memory_bytes()
        _at_least("groups", self.groups, 0)
        _at_least("copies", self.copies, 1)
        _at_least("routers", self.routers, 1)
        if self.routers > 1 and (self.groups == 0 or "inproc" in self.transports()):
            raise ConfigError(f"routers: got {self.routers}; groups in the router's own process have one router")
        if self.placement.moves and (self.groups == 0 or "inproc" in self.transports()):
            raise ConfigError("placement: groups in the router's own process cannot change while it serves")
        if not 0.0001 <= self.gpu_share <= 1.0:
            raise ConfigError(f"gpu_share: got {self.gpu_share!r}; must be from 0.0001 to 1")
        _at_least("threads", self.threads, 0)
        _at_least("drain_s", self.drain_s, 0)
        _at_least("start_timeout_s", self.start_timeout_s, 0.001)
        _one_of("data_plane.missing_experts", self.data_plane.missing_experts, ("wait", "fail", "degrade"))
        for name in ("step_token_budget", "prefill_chunk", "history_tokens"):
            _at_least(f"engine.{name}", getattr(self.engine, name), 0)
        positive = ("max_running", "max_waiting", "kv_cache_bytes", "block_size")
        for name in (*positive, "default_max_new_tokens"):
            _at_least(f"engine.{name}", getattr(self.engine, name), 1)
        _at_least("engine.admission_headroom", self.engine.admission_headroom, 0)
        _at_least("engine.max_deadline_s", self.engine.max_deadline_s, 0.001)
        _at_least("data_plane.call_timeout_s", self.data_plane.call_timeout_s, 0.001)
        _at_least("data_plane.group_wait_s", self.data_plane.group_wait_s, 0)
        _at_least("data_plane.payload_timeout_s", self.data_plane.payload_timeout_s, 0.001)
        _at_least("placement.window_s", self.placement.window_s, 0.1)
        _at_least("placement.min_gain", self.placement.min_gain, 0)
        self.placement.group_range()
        split_address("listen", self.listen)
        self._check_telemetry()
        self._check_security()
        if self.faults.cold_expert:
            self.faults.cold_pair()
        for name in ("compute_ms", "cold_ms", "cold_every_s", "drop_links_s"):
            _at_least(f"faults.{name}", getattr(self.faults, name), 0)

    def _check_telemetry(self) -> None:
        telemetry = self.telemetry
        for kind in telemetry.traces.split(","):
            _one_of("telemetry.traces", kind.strip(), ("auto", "otlp", "file", "off"))
        if telemetry.protocol:
            _one_of("telemetry.protocol", telemetry.protocol, ("grpc", "http/protobuf"))
        _one_of("telemetry.log_level", telemetry.log_level, ("debug", "info", "warning", "error"))
        _one_of("telemetry.log_format", telemetry.log_format, ("json", "text"))
        if not 0.0 <= telemetry.sample_ratio <= 1.0:
            raise ConfigError(f"telemetry.sample_ratio: got {telemetry.sample_ratio!r}; must be from 0 to 1")
        _at_least("telemetry.queue_spans", telemetry.queue_spans, 1)
        _at_least("telemetry.store_bytes", telemetry.store_bytes, 64 * 1024)
        _at_least("telemetry.steps_per_s", telemetry.steps_per_s, 0)
        _at_least("telemetry.detail_steps", telemetry.detail_steps, 0)
        if telemetry.metrics_listen not in ("auto", "off"):
            split_address("telemetry.metrics_listen", telemetry.metrics_listen)

    def _check_security(self) -> None:
        security = self.security
        _at_least("security.max_connections", security.max_connections, 1)
        _at_least("security.handshake_s", security.handshake_s, 0.1)
        if bool(security.cert) != bool(security.key):
            raise ConfigError("security.cert: cert and key belong together; give both or neither")
        for name in ("ca", "client_ca", "peer_name"):
            if getattr(security, name) and not security.tls:
                raise ConfigError(f"security.{name}: got {getattr(security, name)!r}; it needs security.cert and key")
        remote = self.groups > 0 and "inproc" not in self.transports()
        if security.tls and remote and not security.ca:
            raise ConfigError("security.ca: links to groups need the authorities of the groups' certificates")
        if (security.tls or security.tokens) and self.front_door == "serve":
            raise ConfigError(
                "front_door: got 'serve'; Ray Serve's ingress knows neither TLS nor tokens: use --front-door router"
            )
        host, _ = split_address("listen", self.listen)
        if security.tokens and not (security.tls or security.trust_network or host in LOOPBACK):
            raise ConfigError(
                f"security.cert: must be set for tokens on {host}, or they can be read on the way (--trust-network "
                "where nobody can)"
            )
        open_kinds = sorted({"gloo", "nccl"} & set(self.transports()))
        if security.tls and open_kinds and not security.trust_network:
            raise ConfigError(
                f"data_plane.transport: got {open_kinds[0]!r}; it can be neither encrypted nor authenticated, so "
                "beside TLS it needs --trust-network"
            )

    def memory_bytes(self) -> int:
        """``expert_memory`` as bytes; 0 for all.

        Raises:
            ConfigError: it is not a number of bytes.
        """
        text = self.expert_memory.strip()
        if text == "all":
            return 0
        number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
        scale = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}.get(unit)
        try:
            count = float(number)
        except ValueError:
            count = -1.0
        if scale is None or not (math.isfinite(count) and count * (scale or 1) >= 1):
            raise ConfigError(f"expert_memory: got {self.expert_memory!r}; must be all, or bytes such as 512M or 4G")
        return int(count * scale)

    def _check_transport(self) -> None:
        kinds = self.transports()
        for kind in kinds:
            _one_of("data_plane.transport", kind, TRANSPORTS)
        if "inproc" in kinds and len(set(kinds)) > 1:
            raise ConfigError("data_plane.transport: inproc is for all groups or none")

    def transports(self) -> list[str]:
        """The transport of each group's link.

        Raises:
            ConfigError: a list that has another length.
        """
        kinds = [kind.strip() for kind in self.data_plane.transport.split(",")]
        if len(kinds) == 1:
            return kinds * max(1, self.groups)
        if len(kinds) != self.groups:
            raise ConfigError(
                f"data_plane.transport: got {len(kinds)} transports for {self.groups} groups; give one for all, or one "
                "for each group"
            )
        return kinds


def split_address(name: str, value: str) -> tuple[str, int]:
    """``host:port`` as a pair. Port 0 asks for any free port."""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{name}: got {value!r}; must be HOST:PORT with a port from 0 to 65535")
    return host, int(port)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: got {value!r}; must be one of {', '.join(allowed)}")


def _at_least(name: str, value: float, limit: float) -> None:
    if not math.isfinite(value) or value < limit:
        raise ConfigError(f"{name}: got {value!r}; must be at least {limit}")


def _parse(name: str, value: object, kind: type, where: str) -> object:
    """``value`` as ``kind``; strings (environment, flags) are converted, anything else must already fit."""
    problem = ConfigError(f"{where}: {name}: got {value!r}; must be of type {kind.__name__}")
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("1", "true", "yes", "0", "false", "no"):
            return value.lower() in ("1", "true", "yes")
        raise problem
    if value is None or isinstance(value, (bool, dict, list)):
        raise problem
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise problem
    if kind is str and not isinstance(value, str):
        raise problem
    try:
        return kind(value)
    except ValueError as exc:
        raise problem from exc


def _merge(base: Any, values: Mapping[str, object], where: str, prefix: str = "") -> Any:
    hints = typing.get_type_hints(type(base))
    names = [item.name for item in dataclasses.fields(base)]
    changes: dict[str, object] = {}
    for key, value in values.items():
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {prefix}{close[0]}?" if close else f"; known keys: {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}{hint}")
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {prefix}{key}: got {value!r}; must be a section with keys")
            changes[key] = _merge(getattr(base, key), value, where, f"{prefix}{key}.")
        else:
            assert not isinstance(kind, types.UnionType)
            changes[key] = _parse(prefix + key, value, kind, where)
    return dataclasses.replace(base, **changes) if changes else base


def _environment(environ: Mapping[str, str]) -> dict[str, object]:
    """EXPERTMESH_GROUPS=3 and EXPERTMESH_ENGINE__MAX_RUNNING=8 as nested keys."""
    found: dict[str, object] = {}
    for name, value in environ.items():
        if not name.startswith("EXPERTMESH_") or name.startswith(_CLIENT_PREFIX):
            continue
        section, _, key = name.removeprefix("EXPERTMESH_").lower().partition("__")
        if key:
            nested = found.setdefault(section, {})
            if not isinstance(nested, dict):
                raise ConfigError(f"environment: {name} clashes with another variable of section {section}")
            nested[key] = value
        else:
            found[section] = value
    return found


def client_security(environ: Mapping[str, str] | None = None) -> ClientSecurity:
    """What this machine's clients show and want to see.

    Raises:
        ConfigError: unknown variable, or some that do not go together.
    """
    environ = os.environ if environ is None else environ
    values = {
        name.removeprefix(_CLIENT_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(_CLIENT_PREFIX)
    }
    found: ClientSecurity = _merge(ClientSecurity(), values, "environment", _CLIENT_PREFIX.lower())
    if bool(found.cert) != bool(found.key):
        raise ConfigError(f"{_CLIENT_PREFIX}CERT: it and {_CLIENT_PREFIX}KEY belong together; set both or neither")
    if (found.cert or found.name) and not found.ca:
        raise ConfigError(f"{_CLIENT_PREFIX}CA: must be set where a certificate or a name of the server's is")
    if found.token and found.token_file:
        raise ConfigError(f"{_CLIENT_PREFIX}TOKEN: it or {_CLIENT_PREFIX}TOKEN_FILE, not both")
    return found


def config_of(values: Mapping[str, object]) -> Config:
    """The configuration of a file's content alone.

    Raises:
        ConfigError: as `load_config`.
    """
    config: Config = _merge(Config(), values, "configuration")
    return config


def load_config(
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The configuration from all sources. ``flags`` may be nested; values of None are left out.

    Raises:
        ConfigError: unknown key, wrong type, value outside its limits, or a file that is not YAML.
    """
    sources: list[tuple[str, Mapping[str, object]]] = []
    if file is not None:
        try:
            loaded = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as exc:  # of dates, some
            raise ConfigError(f"--config: cannot read {str(file)!r}: {' '.join(str(exc).split())}") from exc
        if loaded is None:
            loaded = {}
        if not isinstance(loaded, dict):
            raise ConfigError(f"--config: {str(file)!r} must hold keys and values, got {type(loaded).__name__}")
        sources.append((str(file), loaded))
    sources.append(("environment", _environment(os.environ if environ is None else environ)))
    sources.append(("command line", _without_none(flags or {})))
    config = Config()
    merged: dict[str, object] = {}
    for where, values in sources:
        _merge(config, values, where)  # reported under the name of the source that is wrong
        merged = _deep_merge(merged, values)
    result: Config = _merge(config, merged, "configuration")
    return result


def _without_none(values: Mapping[str, object]) -> dict[str, object]:
    cleaned = {k: _without_none(v) if isinstance(v, Mapping) else v for k, v in values.items() if v is not None}
    return {k: v for k, v in cleaned.items() if v != {}}


def _deep_merge(base: Mapping[str, object], top: Mapping[str, object]) -> dict[str, object]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _deep_merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
