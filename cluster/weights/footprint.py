"""Bytes that a served model will take, process by process, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from cluster.errors import ConfigError
from cluster.weights.mapping import WeightMap

PROCESS_BYTES = 450 * 1024**2
"""Python with torch, transformers and Ray, before any weight (measured: 380 to 430 MiB resident)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of one process: weights, and for a router the key-value cache."""

    name: str
    weights: int
    cache: int = 0

    @property
    def total(self) -> int:
        """With the process itself."""
        return self.weights + self.cache + PROCESS_BYTES


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, or of the machine's."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_bytes()


def footprints(
    weights: WeightMap,
    holdings: Sequence[Sequence[Sequence[int]]],
    dtype: torch.dtype,
    cache_bytes: int,
    one_process: bool,
    expert_bits: int,
    expert_budget: int = 0,
) -> list[Footprint]:
    """The router's first, then one a group; all in one where the groups live in the router's process.

    ``expert_budget`` (0: none) is what a group's experts may take.
    """
    layers = weights.skeleton.moe_layers
    groups = [
        sum(
            len(experts) * weights.expert_bytes(layer, dtype) * expert_bits // (8 * dtype.itemsize)
            for layer, experts in zip(layers, group, strict=True)
        )
        for group in holdings
    ]
    groups = [min(size, expert_budget) if expert_budget else size for size in groups]
    trunk = weights.trunk_bytes(dtype)
    if one_process:
        return [Footprint("router with all experts", trunk + sum(groups), cache_bytes)]
    return [Footprint("router", trunk, cache_bytes)] + [Footprint(f"group {i}", size) for i, size in enumerate(groups)]


def available_bytes() -> int:
    """Memory that this machine (or the container around this process) can still give."""
    available = int(psutil.virtual_memory().available)
    limit_file, used_file = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        limit = limit_file.read_text(encoding="ascii").strip()
        if limit != "max":
            available = min(available, int(limit) - int(used_file.read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return max(0, available)


def check_fits(processes: Sequence[Footprint], available: int, where: str) -> None:
    """Refuses what does not fit, with numbers for each process.

    Raises:
        ConfigError: the sum is more than ``available``.
    """
    needed = sum(process.total for process in processes)
    if needed <= available:
        return
    lines = ", ".join(
        f"{p.name} {gib(p.weights)} weights" + (f" + {gib(p.cache)} key-value cache" if p.cache else "")
        for p in processes
    )
    raise ConfigError(
        f"the model does not fit {where}: {gib(needed)} needed, {gib(available)} available ({lines}, and "
        f"{gib(PROCESS_BYTES)} a process); use a smaller --dtype, a smaller engine.kv_cache_bytes, or more machines"
    )


def gib(num_bytes: int) -> str:
    """As people read it."""
    return f"{num_bytes / 1024**3:.2f} GiB"
