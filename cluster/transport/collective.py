"""Rows by process groups: what the transports `nccl` and `gloo` add to the gRPC stream.

Each link has two process groups of two ranks, one for each direction, so that a dead peer costs one link and the two
directions never wait for each other. The gRPC stream announces every payload, in the order in which the payloads are
sent, and the receiver posts its receive only then: a wait covers the transfer, never the peer's computing. A wait that
times out means that the link is broken (gloo closes the pair; NCCL runs operations in posted order, so nothing behind
it can be right); a new link has new process groups, which meet under a new name.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch._C._distributed_c10d import Store as TorchStore

from cluster.config import split_address
from cluster.core import Deadline
from cluster.errors import LinkBroken
from cluster.transport.arena import LeasedMemory

log = logging.getLogger(__name__)

KINDS = ("gloo", "nccl")
ROUTER_RANK, GROUP_RANK = 0, 1
POOL_BYTES = 256 * 1024**2
"""Address space for payloads that were received and are in use; pages take memory once they are touched."""
_POLL_S = 20e-6


def available() -> tuple[str, ...]:
    """Kinds that this process can make: gloo where torch has it, NCCL where there is a GPU too."""
    if not dist.is_available():
        return ()
    have = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available() and torch.cuda.is_available()}
    return tuple(kind for kind in KINDS if have[kind])


class Store:
    """The group's meeting point. torch's own store would listen on all interfaces, so it is given a socket."""

    def __init__(self, bind: str, host_address: str, timeout_s: float) -> None:
        listening = socket.create_server((bind, 0), family=socket.AF_INET6 if ":" in bind else socket.AF_INET)
        port = listening.getsockname()[1]
        self.address = f"{host_address}:{port}"
        self.store = TCPStore(
            host_address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listening.detach(),
        )


def connect_store(address: str, timeout_s: float) -> TorchStore:
    """The router's end of a `Store`."""
    host, port = split_address("store", address)
    return TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=max(0.001, timeout_s))
    )


def own_interface(address: str) -> str:
    """Address of this host's interface that leads to ``HOST:PORT``."""
    host, port = split_address("store", address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((host.strip("[]"), port))
        own: str = probe.getsockname()[0]
        return own


class _Group:
    """A process group of two ranks, for one direction."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, tensor: torch.Tensor, peer: int) -> Any:
        """Begins a transfer; the result is for `finish`."""
        return self._group.send([tensor], peer, 0)

    def recv(self, tensor: torch.Tensor, peer: int) -> Any:
        """Posts a receive; the result is for `finish`."""
        return self._group.recv([tensor], peer, 0)

    def finish(self, work: Any, timeout_s: float) -> None:
        """Waits for a transfer. Raises RuntimeError when it fails or takes too long."""
        work.wait(timedelta(seconds=max(0.001, timeout_s)))

    def abort(self) -> None:
        """Ends it; transfers under way fail."""
        self._group.abort()


class _Gloo(_Group):
    """``interface`` is the address of this end's own interface."""

    def __init__(self, store: TorchStore, rank: int, timeout_s: float, interface: str) -> None:
        kind: Any = dist.ProcessGroupGloo
        options = kind._Options()
        options._timeout, options._threads = timedelta(seconds=timeout_s), 1
        options._devices = [kind.create_device(hostname=interface, interface="")]
        super().__init__(kind(store, rank, 2, options))


class _Nccl(_Group):
    """NCCL has no time-out of its own for a point-to-point wait, so completion is polled for."""

    def __init__(self, store: TorchStore, rank: int, timeout_s: float) -> None:
        kind: Any = dist.ProcessGroupNCCL
        options = kind.Options()
        options._timeout = timedelta(seconds=timeout_s)
        super().__init__(kind(store, rank, 2, options))

    def finish(self, work: Any, timeout_s: float) -> None:
        """As above."""
        deadline = Deadline.after(timeout_s)
        while not work.is_completed():
            if deadline.expired():
                raise RuntimeError(f"NCCL did not complete a transfer within {timeout_s:g} s")
            time.sleep(_POLL_S)
        work.wait()  # orders this thread's stream behind the transfer


class PayloadPair:
    """Both directions of one link's payloads. ``broken(error)`` is told once when a transfer fails.

    The constructor returns when both ends have made their groups and one element went each way.

    Raises (constructor):
        LinkBroken: they did not within ``timeout_s``.
    """

    def __init__(
        self,
        kind: str,
        store: TorchStore,
        generation: str,
        rank: int,
        timeout_s: float,
        device: torch.device,
        interface: str,
        broken: Callable[[LinkBroken], None],
    ) -> None:
        self._kind, self._peer, self._timeout_s, self._broken = kind, 1 - rank, timeout_s, broken
        self._device = device if kind == "nccl" else torch.device("cpu")
        self._outbox: queue.SimpleQueue[torch.Tensor | None] = queue.SimpleQueue()
        self._closed = False
        # Not zeroed: pages that no payload was in take no memory.
        self._pool = LeasedMemory(np.empty(POOL_BYTES, np.uint8)) if self._device.type == "cpu" else None
        calls, replies = (PrefixStore(f"{generation}/{name}", store) for name in ("calls", "replies"))
        try:
            groups = [self._make(part, rank, interface) for part in (calls, replies)]
            self._out, self._in = groups if rank == ROUTER_RANK else reversed(groups)
            self._greet(rank)
        except RuntimeError as exc:
            raise LinkBroken(f"process groups ({kind}) could not be made: {_first_line(exc)}") from exc
        self._sender = threading.Thread(target=self._send_all, name=f"{kind}-send", daemon=True)
        self._sender.start()

    def _make(self, store: TorchStore, rank: int, interface: str) -> _Group:
        if self._kind == "nccl":
            return _Nccl(store, rank, self._timeout_s)
        return _Gloo(store, rank, self._timeout_s, interface)

    def _greet(self, rank: int) -> None:
        """One element each way: NCCL connects at the first transfer only, and no token should wait for that."""
        token = torch.zeros(1, device=self._device)
        for turn in (ROUTER_RANK, GROUP_RANK):
            group, work = (self._out, self._out.send) if turn == rank else (self._in, self._in.recv)
            group.finish(work(token, self._peer), self._timeout_s)

    def send(self, tensor: torch.Tensor) -> None:
        """Queues a payload; to be called in the order of the announcements. The tensor must not change until the peer
        has answered. Empty ones are not sent."""
        if tensor.numel():
            self._outbox.put(tensor.to(self._device).contiguous())

    def _send_all(self) -> None:
        while (tensor := self._outbox.get()) is not None:
            try:
                self._out.finish(self._out.send(tensor, self._peer), self._timeout_s)
            except RuntimeError as exc:
                self._fail(exc)
                return
            del tensor

    def receive(self, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
        """Waits for the payload that was announced.

        Raises:
            LinkBroken: it did not come in time, or the peer is gone.
        """
        tensor = self._buffer(dtype, shape)
        if tensor.numel():
            try:
                self._in.finish(self._in.recv(tensor, self._peer), self._timeout_s)
            except RuntimeError as exc:
                raise self._fail(exc) from exc
        return tensor

    def _buffer(self, dtype: torch.dtype, shape: tuple[int, int]) -> torch.Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        block = self._pool.make(self._pool.home(None), size) if self._pool is not None and size else None
        if self._pool is None or block is None:
            return torch.empty(shape, dtype=dtype, device=self._device)  # on GPUs torch's allocator is the pool
        memory = self._pool.lease(block, block.offset, (size,), np.dtype(np.uint8))
        return torch.from_numpy(memory).view(dtype).view(shape)

    def _fail(self, exc: RuntimeError) -> LinkBroken:
        error = LinkBroken(f"{self._kind} payload failed: {_first_line(exc)}")
        if not self._closed:
            self._broken(error)
        return error

    def close(self) -> None:
        """Ends both groups; transfers under way fail."""
        if self._closed:
            return
        self._closed = True
        self._outbox.put(None)
        for group in (self._out, self._in):
            with contextlib.suppress(RuntimeError):
                group.abort()


def _first_line(exc: RuntimeError) -> str:
    return (str(exc).strip().splitlines() or ["no reason given"])[0][:300]
