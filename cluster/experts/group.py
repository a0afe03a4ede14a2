"""One expert group put together: weights, compute thread, data-plane server. A plain class; the shell is Serve's."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cluster.config import Config
from cluster.core import GroupId, GroupInfo, LayerCall, StoreFacts
from cluster.errors import Unavailable
from cluster.experts.bank import ExpertBank
from cluster.experts.compute import Compute
from cluster.experts.faults import LinkDropper, with_faults
from cluster.experts.host import ExpertHost
from cluster.experts.identity import Identity
from cluster.experts.inline import InlineHost
from cluster.experts.loads import LoadNotes
from cluster.experts.server import DataPlaneServer, Offers
from cluster.experts.shm_server import ShmServer
from cluster.kernels.linear import SMALL_BYTES, KernelTable
from cluster.kernels.team import release_team
from cluster.placement.binding import Binding, Where, numa_attributes
from cluster.placement.planner import Holdings
from cluster.telemetry.hub import telemetry_of
from cluster.telemetry.memory import give_back_memory, process_facts
from cluster.telemetry.records import PhaseRecord
from cluster.transport.base import LayerReply, LayerRows
from cluster.transport.collective import available
from cluster.transport.gpus import pci_address
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.dtypes import DTYPE_NAMES, pick_device, resolve_dtype
from cluster.weights.footprint import free_bytes
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton

LOADING_SHARE = 0.15
"""Of the time, that experts are loaded while others are computed."""
WARM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Rows of one expert that a group computes once before it is ready."""


class ExpertGroup:
    """Loads ``holdings`` (per MoE layer, sorted logical experts) and computes them.

    With ``listen`` it also serves the data plane on ``config.data_plane.bind``; when that is all interfaces, routers
    are told ``host_address``. ``binding`` says where this process sits, if anybody placed it. The constructor returns
    when every layer has computed once.
    """

    def __init__(
        self,
        group: GroupId,
        holdings: Holdings,
        config: Config,
        threads: int,
        listen: bool = True,
        host_address: str = "127.0.0.1",
        binding: Binding | None = None,
    ) -> None:
        self.group, self._binding = group, binding
        started = PhaseRecord("moe.startup", time.monotonic())
        self._incarnation = uuid.uuid4().hex
        checkpoint = Checkpoint(config.model)
        self._device = pick_device(config.device)
        dtype = resolve_dtype(config.dtype, checkpoint.dtype, self._device.type == "cuda")
        skeleton = build_skeleton(checkpoint, dtype)
        weights = WeightMap(checkpoint, skeleton)
        sizes = [weights.expert_bytes(layer, dtype) for layer in skeleton.moe_layers]
        num_bytes = sum(size * len(experts) for size, experts in zip(sizes, holdings, strict=True))
        self._sizes = tuple(sizes)
        how = how_to_compute(config, dtype, self._device, threads, num_bytes)
        notes = LoadNotes()
        self.bank = ExpertBank.load(group, weights, holdings, how, notes)
        started.done("weights", time.monotonic())
        self.telemetry = telemetry_of(
            config.telemetry,
            "expertmesh-experts",
            {"moe.group": group, "moe.device": str(self._device), **numa_attributes(binding)},
            checkpoint.path.name,
            serve_metrics=False,
        )
        compute = with_faults(self.bank.compute, group, config.faults, notes)
        self._fingerprint, self._dtype = checkpoint.fingerprint, DTYPE_NAMES[dtype]
        self.host: ExpertHost | InlineHost
        on_order = None if self.bank.store is None else self.bank.store.order
        if listen:
            # A planted fault is in the way of those that are served without it.
            served = self.bank.served() if compute == self.bank.compute and threads == 1 else None
            self.host = host = ExpertHost(
                compute,
                f"experts-{group}",
                threads,
                notes=notes,
                observe=self._observe,
                on_order=on_order,
                served=served,
            )
            if served is not None:
                self.bank.change_with(host.between_calls)
        else:
            self.host = InlineHost(compute, notes=notes, observe=self._observe, on_order=on_order)
        hidden_size = int(checkpoint.config.get_text_config(decoder=True).hidden_size)
        if config.warm_up:
            self._warm_up(hidden_size, dtype)
            started.done("experts", time.monotonic())
            self._warm_up_shapes([sizes.index(size) for size in sorted(set(sizes))], hidden_size, dtype)
            started.done("kernel_shapes", time.monotonic())
        give_back_memory()
        if binding is not None:
            binding.check()
        self._started_s = time.monotonic()
        identity = Identity(group, self._incarnation, self._fingerprint, self._dtype, config.data_plane.secret)
        self.shm_server: ShmServer | None = None
        self.server: DataPlaneServer | None = None
        if isinstance(self.host, ExpertHost):
            data_plane = config.data_plane
            self.shm_server = ShmServer(identity, self.host)
            security = config.security
            offers = Offers(
                self.shm_server.address,
                self._device,
                pci_address(self._device),
                data_plane.payload_timeout_s,
                tuple(available()) if security.trust_network or not security.tls else (),
            )
            self.server = DataPlaneServer(identity, self.host, data_plane.bind, host_address, offers, security)
        started.done("servers", time.monotonic())
        self._startup = started.seconds()
        self._epoch, self._epoch_lock = 0, threading.Lock()
        # Started here, where memory policies of this process are set: threads inherit them.
        self._holder = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="hold", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._holder.submit(int).result()
        release_team()  # from now on the host's thread computes
        self._dropper: LinkDropper | None = None
        if config.faults.group == group and config.faults.drop_links_s > 0 and listen:
            self._dropper = LinkDropper(self.drop_links, config.faults.drop_links_s)
        if self.telemetry is not None:
            self.telemetry.phases(started)

    def _observe(self, call: LayerCall, started_s: float, ended_s: float, reply: LayerReply) -> None:
        if self.telemetry is not None:
            self.telemetry.layer_call(call, started_s, ended_s, reply.queue_s, reply.load_s, reply.partial_TH.shape[0])

    def told_by(self, epoch: int) -> None:
        """A coordinator of this epoch speaks; those before it are not listened to any more.

        Raises:
            Unavailable: there has been a newer one.
        """
        with self._epoch_lock:
            if epoch < self._epoch:
                raise Unavailable(
                    f"coordinator {epoch} is over: group {self.group} has heard of coordinator {self._epoch}"
                )
            self._epoch = epoch

    def hold(self, layer: int, experts: Sequence[int]) -> Future[int]:
        """From now on a MoE layer holds exactly these logical experts. New ones are read, and run once, in a thread
        that takes its time, before calls may name them; bytes that were read."""
        return self._holder.submit(self._hold, layer, tuple(experts))

    def _hold(self, layer: int, experts: tuple[int, ...]) -> int:
        num_bytes = self.bank.hold(layer, experts, Breather(LOADING_SHARE))
        give_back_memory()
        return num_bytes

    def drop_links(self) -> None:
        """Closes all links to routers, for drills and planted faults."""
        for server in (self.server, self.shm_server):
            if server is not None:
                server.drop_links()

    def _warm_up(self, hidden_size: int, dtype: torch.dtype) -> None:
        """Runs every expert of every layer once, so that no first request pays for lazy set-up; where they do not all
        fit, the same share of each layer."""
        store = self.bank.store
        held = sum(len(experts) for experts in self.bank.holdings)
        share = 1.0 if store is None else store.capacity() / max(1, held)
        for layer, every in enumerate(self.bank.holdings):
            experts = every[: max(1, int(share * len(every)))] if every else every
            count = len(experts)
            rows = LayerRows.of(torch.randn(1, hidden_size).to(dtype), [0] * count, experts, 1.0)
            self.bank.compute(layer, rows)

    def _warm_up_shapes(self, layers: list[int], hidden_size: int, dtype: torch.dtype) -> None:
        """Runs some layers with few rows and with many an expert: kernels are chosen, and some of them made, when they
        first meet a number of rows."""
        for layer in layers:
            experts = self.bank.holdings[layer][:2]
            for count in WARM_ROWS if experts else ():
                hidden_TH = torch.randn(count, hidden_size).to(dtype)
                pairs = [(row, expert) for row in range(count) for expert in experts]
                rows = LayerRows.of(hidden_TH, [row for row, _ in pairs], [expert for _, expert in pairs], 0.5)
                self.bank.compute(layer, rows)

    def info(self) -> GroupInfo:
        """What this group says of itself."""
        facts = process_facts()
        where = self._binding.where() if self._binding is not None else Where()
        return GroupInfo(
            group=self.group,
            address=self.server.address if self.server is not None else "",
            incarnation=self._incarnation,
            holdings=self.bank.holdings,
            fingerprint=self._fingerprint,
            dtype=self._dtype,
            pid=facts.pid,
            host=facts.host,
            device=str(self._device),
            visible_devices=visible_devices(),
            expert_bytes=self.bank.num_bytes,
            store=self._store_facts(),
            spans_dropped=self.telemetry.counts()["dropped"] if self.telemetry is not None else 0,
            rss_bytes=facts.rss_bytes,
            anonymous_bytes=facts.anonymous_bytes,
            calls=self.host.calls,
            busy_s=self.host.busy_s,
            free_bytes=free_bytes(self._device),
            progress_age_s=self.host.progress_age_s(),
            numa_node=where.node,
            numa_local_ratio=where.local_ratio,
            expert_sizes=self._sizes,
            startup=self._startup,
            refused_links=sum(server.refused for server in (self.server, self.shm_server) if server is not None),
        )

    def stuck_s(self) -> float:
        """Seconds without any progress: of the compute thread, or of the loads that it may be waiting for."""
        age_s = self.host.progress_age_s()
        store = self.bank.store
        return age_s if store is None else min(age_s, store.progress_age_s() or age_s)

    def _store_facts(self) -> StoreFacts | None:
        store = self.bank.store
        if store is None:
            return None
        stats = store.stats
        return StoreFacts(
            budget_bytes=self.bank.how.memory_bytes,
            resident=store.num_resident(),
            capacity=store.capacity(),
            found=tuple(layer.found for layer in store.layers),
            hits=tuple(layer.hits for layer in store.layers),
            stalls=tuple(layer.stalls for layer in store.layers),
            late=tuple(layer.late for layer in store.layers),
            wasted_bytes=tuple(layer.wasted_bytes for layer in store.layers),
            stalled_s=stats.stalled_s,
            loads=stats.loads,
            loads_s=stats.loads_s,
            loaded_bytes=stats.loaded_bytes,
            evictions=stats.evictions,
            ahead=stats.ahead,
            progress_age_s=store.progress_age_s(),
            direct=self.bank.reads_direct(),
            gap_s=store.residency.gap_s(),
            expert_bytes=tuple(store.pool(layer).expert_bytes for layer in range(len(store.layers))),
            resident_experts=store.resident_experts(),
        )

    def close(self) -> None:
        """Ends the servers, the compute thread and the telemetry."""
        self._holder.shutdown(wait=False, cancel_futures=True)
        if self._dropper is not None:
            self._dropper.close()
        for server in (self.server, self.shm_server):
            if server is not None:
                server.close()
        self.host.close()
        self.bank.close()
        if self.telemetry is not None:
            self.telemetry.close()


class Breather:
    """Called after each piece of work of a thread, waits until that has worked for no more than ``share`` of the time.

    A lower priority instead would not do: whoever has it may lose its core while it holds Python's lock, and then those
    that compute wait for that.
    """

    def __init__(self, share: float) -> None:
        self._times = 1.0 / share - 1.0
        self._since_s = time.perf_counter()

    def __call__(self) -> None:
        time.sleep(min(5.0, (time.perf_counter() - self._since_s) * self._times))
        self._since_s = time.perf_counter()


def how_to_compute(config: Config, dtype: torch.dtype, device: torch.device, threads: int, num_bytes: int) -> Compute:
    """What the configuration says, and on CPUs what the machine's kernels are worth with one thread."""
    table = None
    if device.type == "cpu" and dtype is torch.float32 and num_bytes > SMALL_BYTES:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            table = KernelTable.measure()
        finally:
            torch.set_num_threads(before)
    return Compute(
        dtype,
        device,
        config.expert_dtype,
        threads,
        table,
        config.memory_bytes(),
        config.predict_experts,
        config.expert_reads == "direct",
    )


def own_gpu(config: Config) -> str | None:
    """PCI address of the GPU that this process computes on, as sysfs writes it; None on CPUs, and where others compute
    on it too: the place beside it is one process's."""
    if config.gpu_share < 1:
        return None
    address = pci_address(pick_device(config.device))
    return f"{address}.0" if address else None


def visible_devices() -> str:
    """The accelerators that Ray gave this process. Ray tells them in this variable and nowhere else."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "")
