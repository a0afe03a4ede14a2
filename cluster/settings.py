"""The sections of the configuration: what can be set, and its defaults. Read and checked by `cluster.config`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of the step loop."""

    max_running: int = 64
    """Sequences that share a step at most."""
    max_waiting: int = 256
    """Requests that wait for a place at most; one more is refused with RESOURCE_EXHAUSTED."""
    step_token_budget: int = 0
    """Tokens of one step at most; decode tokens first, the rest goes to prefill chunks. 0: 512 on CPUs, 4096 on
    GPUs."""
    prefill_chunk: int = 0
    """Prefill tokens of a step while any sequence decodes and little waits, and twice as many at most: bounds the gap
    between two tokens of a stream. 0: 96 on CPUs, 1024 on GPUs."""
    history_tokens: int = 0
    """A prefill token behind so many others counts as two in such a step. 0: by the model's attention and weights."""
    kv_cache_bytes: int = 2 * 1024**3
    """Bytes of key-value cache at most; admission waits for room, and when it runs out the last to come starts over."""
    block_size: int = 16
    """Tokens of one block of the key-value cache."""
    admission_headroom: int = 16
    """Nobody is admitted into blocks that running sequences will need before each has grown by so many tokens: more
    costs places in the batch, less costs preemptions."""
    prefix_caching: bool = True
    """Keeps the blocks of requests that have ended, as long as there is room, for requests that begin alike."""
    default_max_new_tokens: int = 128
    """What a request without max_new_tokens gets."""
    max_deadline_s: float = 600.0
    """No request lives longer, whatever its deadline says."""

    def sized(self, on_gpu: bool, history_tokens: int = 0) -> EngineConfig:
        """With numbers for what is 0: a step of so many tokens takes about as long on either."""
        budget, chunk = (4096, 1024) if on_gpu else (512, 96)
        return replace(
            self,
            step_token_budget=self.step_token_budget or budget,
            prefill_chunk=self.prefill_chunk or chunk,
            history_tokens=self.history_tokens or history_tokens,
        )


@dataclass(frozen=True, slots=True)
class DataPlaneConfig:
    """Links from routers to groups."""

    transport: str = "auto"
    """auto (the best that both ends of a link can do), shm, grpc, nccl, gloo, or a list with one for each group, such
    as shm,grpc; or inproc (groups in the router's own process)."""
    bind: str = "127.0.0.1"
    """Interface that a group's data-plane server listens on."""
    call_timeout_s: float = 60.0
    """A layer call without an answer for that long counts as lost."""
    missing_experts: str = "wait"
    """For experts without a living copy: wait (group_wait_s at most), fail (UNAVAILABLE at once), or degrade (they are
    left out; such answers say that they are not exact, and which experts were missing)."""
    fail_over: bool = True
    """Calls that fail, hang or take long are sent to other copies at once. Off only to see what watching them costs:
    then a group that fails is waited for."""
    group_wait_s: float = 30.0
    """How long a step waits for a group that is gone to come back before its requests fail."""
    payload_timeout_s: float = 10.0
    """A transfer over nccl or gloo that takes longer breaks its link; gRPC carries on."""
    secret: str = field(default="", repr=False)
    """Shared by all processes of one cluster; made afresh by `serve` when empty."""


@dataclass(frozen=True, slots=True)
class SecurityConfig:
    """Who may come in. Files are read again when they change: no restart for a new certificate or token."""

    cert: str = ""
    """PEM file with the certificate of this cluster's servers, of the client port and of every gRPC link. Empty: plain
    text."""
    key: str = ""
    """PEM file with its private key."""
    ca: str = ""
    """PEM file of the authorities that routers and groups accept each other's certificates from."""
    peer_name: str = ""
    """Name in the groups' certificates, where they were not issued for the groups' addresses."""
    client_ca: str = ""
    """PEM file of the authorities whose certificates clients must show (mutual TLS); empty: clients need none."""
    tokens: str = ""
    """File of bearer tokens that clients must send one of, as `expertmesh token` writes it; empty: they need none."""
    trust_network: bool = False
    """The network is this cluster's alone. Allows gloo and NCCL, which can be neither encrypted nor authenticated,
    beside TLS, and tokens without TLS on other interfaces than loopback."""
    max_connections: int = 16384
    """Connections to the client port at a time; more are closed at once."""
    handshake_s: float = 10.0
    """A connection to the client port that has not finished its handshake by then is closed."""

    @property
    def tls(self) -> bool:
        """Servers show a certificate."""
        return bool(self.cert)


@dataclass(frozen=True, slots=True)
class ClientSecurity:
    """What our client shows, and what it wants to see. From the environment: EXPERTMESH_CLIENT_CA and so on."""

    ca: str = ""
    """PEM file of authorities that the server's certificate must come from; empty: plain text."""
    cert: str = ""
    """PEM file of the client's certificate, where the server wants one."""
    key: str = ""
    """PEM file of its private key."""
    name: str = ""
    """Name in the server's certificate, where it was not issued for the address."""
    token: str = field(default="", repr=False)
    """Bearer token."""
    token_file: str = ""
    """File with the bearer token, instead."""
    trust_network: bool = False
    """Sends the token without TLS, too."""


@dataclass(frozen=True, slots=True)
class TelemetryConfig:
    """Traces, metrics and logs. The standard OTEL_* variables hold where a key here does not say otherwise."""

    traces: str = "auto"
    """otlp (to a collector), file (the embedded store), off, or otlp,file; auto: otlp where an endpoint is set here or
    in OTEL_EXPORTER_OTLP_ENDPOINT, else file."""
    endpoint: str = ""
    """OTLP endpoint, such as http://127.0.0.1:4317; empty: OTEL_EXPORTER_OTLP_ENDPOINT."""
    protocol: str = ""
    """grpc or http/protobuf; empty: OTEL_EXPORTER_OTLP_PROTOCOL, else grpc."""
    sample_ratio: float = 1.0
    """Share of ordinary requests whose traces are kept. Failed, slow, cold and failed-over ones are always kept."""
    queue_spans: int = 16384
    """Spans that wait for the exporter at most; more are dropped and counted."""
    store: str = ""
    """Directory of the embedded store; empty: expertmesh/traces in the user's state directory."""
    store_bytes: int = 64 * 1024**2
    """Bytes that the embedded store keeps at most; the oldest traces go first."""
    steps_per_s: float = 1.0
    """Steps that get a trace of their own, a second at most; 0: none but those asked for in detail."""
    detail_steps: int = 8
    """Steps of a request that asked for details (x-moe-trace-detail: layer) whose layers are traced one by one."""
    metrics_listen: str = "auto"
    """HOST:PORT of the Prometheus endpoint, auto (127.0.0.1:9464, or any free port where that is taken) or off."""
    log_level: str = "info"
    """debug, info, warning or error."""
    log_format: str = "json"
    """json (one object a line) or text."""
    log_prompts: bool = False
    """Puts prompts and answers into traces. Off: no text of any request leaves the process by telemetry."""


@dataclass(frozen=True, slots=True)
class FaultsConfig:
    """Faults to plant, for trying out what traces say of them. Never set by default."""

    group: int = -1
    """The group that gets them; -1: none."""
    compute_ms: float = 0.0
    """Added to each of its layer calls."""
    cold_expert: str = ""
    """LAYER/EXPERT that counts as not loaded."""
    cold_ms: float = 0.0
    """What loading it takes."""
    cold_every_s: float = 1.0
    """How long it stays loaded."""
    drop_links_s: float = 0.0
    """Its links are dropped so often; 0: never."""

    def cold_pair(self) -> tuple[int, int]:
        """Layer and expert of ``cold_expert``.

        Raises:
            ConfigError: it is not LAYER/EXPERT.
        """
        layer, _, expert = self.cold_expert.partition("/")
        if not (layer.isdecimal() and expert.isdecimal()):
            raise ConfigError(f"faults.cold_expert: got {self.cold_expert!r}; must be LAYER/EXPERT, such as 3/17")
        return int(layer), int(expert)


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Which group holds which experts, while the load changes."""

    plan: str = ""
    """File with the placement to start with, as `plan --json` writes it; empty: even blocks."""
    balance: bool = False
    """Experts move between groups, while serving, where measured loads say that this makes groups more even."""
    autoscale: str = ""
    """MIN:MAX groups between which the coordinator adds and removes groups by how busy they are; empty: never."""
    window_s: float = 10.0
    """Length of a load window."""
    min_gain: float = 0.05
    """Of balancedness (mean over maximum of the groups' loads), that a change must promise."""

    def group_range(self) -> tuple[int, int] | None:
        """``autoscale`` as (least, most); None where it is off.

        Raises:
            ConfigError: it is not MIN:MAX.
        """
        if not self.autoscale:
            return None
        least, _, most = self.autoscale.partition(":")
        if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
            raise ConfigError(f"placement.autoscale: got {self.autoscale!r}; must be MIN:MAX groups, such as 2:4")
        return int(least), int(most)

    @property
    def moves(self) -> bool:
        """Placement changes by itself."""
        return self.balance or bool(self.autoscale)
