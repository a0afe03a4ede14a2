"""Matrix products on CPUs: the library's or our own tiles, whichever is faster for so many rows on this machine.

Decode multiplies a handful of rows with weights that are in no cache, where torch's product takes up to three times as
long as reading them. Which wins for how many rows depends on the CPU; so it is measured when a process starts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cluster.kernels.tiles import TiledWeight, can_tile, tiled_product

ROWS = (1, 4, 16, 64, 256)
_SIZE, _WEIGHTS, _ROUNDS = 1024, 24, 4
_TIE = 1.05

SMALL_BYTES = 32 * 1024**2
"""Weights of a process that are no more than this lie in caches, and nothing needs to be measured."""


class KernelTable:
    """``seconds[rows]`` are times of one product: torch's and, where this machine can run it, the tiled one."""

    def __init__(self, seconds: dict[int, tuple[float, float | None]]) -> None:
        self.seconds = dict(sorted(seconds.items()))
        self.tiled_up_to = 0
        """So many rows tiles are best up to, or as good."""
        for rows, (plain, tiled) in self.seconds.items():
            if tiled is None or tiled > _TIE * plain:
                break
            self.tiled_up_to = rows if rows < ROWS[-1] else sys.maxsize

    @classmethod
    def measure(cls, clock: Callable[[], float] = time.perf_counter) -> KernelTable:
        """Times both with the calling thread's number of threads, on weights that no cache holds. Less than a second;
        takes 100 MB meanwhile."""
        weights = torch.randn(_WEIGHTS, _SIZE, _SIZE)
        seconds: dict[int, tuple[float, float | None]] = {}
        with torch.inference_mode():
            for rows in ROWS:
                x = torch.randn(rows, _SIZE)
                routes: list[Callable[[int], Any]] = [lambda i, x=x: F.linear(x, weights[i])]  # type: ignore[misc]
                if can_tile(weights):
                    routes.append(lambda i, x=x: tiled_product(x, weights, (i,), (len(x),)))  # type: ignore[misc]
                plain, *tiled = _in_turns(routes, clock)
                seconds[rows] = plain, tiled[0] if tiled else None
        return cls(seconds)


def _in_turns(routes: Sequence[Callable[[int], Any]], clock: Callable[[], float]) -> list[float]:
    """A low quartile of each: what else runs on the machine only adds, and in turns it adds to all."""
    times: list[list[float]] = [[] for _ in routes]
    for i in range(4 * _ROUNDS):
        for number, (route, taken) in enumerate(zip(routes, times, strict=True)):
            far = i + number * _WEIGHTS // len(routes)  # what another has just read lies in a cache
            started = clock()
            route(far % _WEIGHTS)
            taken.append(clock() - started)
    return [sorted(taken)[_ROUNDS] for taken in times]


class FastLinear:
    """Stands in for one ``nn.Linear`` on the CPU: what is faster for the rows of each call."""

    def __init__(self, weight_NK: torch.Tensor, bias: torch.Tensor | None, table: KernelTable) -> None:
        self._weight, self._bias = weight_NK, bias
        self._few = table.tiled_up_to if can_tile(weight_NK) else 0
        self._tiled = TiledWeight(weight_NK)
        self._outputs, self._inputs = weight_NK.shape

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``F.linear(x, weight, bias)``."""
        rows = x.numel() // self._inputs
        if not 0 < rows <= self._few:
            return F.linear(x, self._weight, self._bias)
        product = self._tiled.product(x.reshape(rows, self._inputs))
        if self._bias is not None:
            product += self._bias
        return product.view(*x.shape[:-1], self._outputs)


class FastNorm:
    """Stands in for one RMSNorm module of transformers: one call of torch's instead of six."""

    def __init__(self, weight_H: torch.Tensor, epsilon: float) -> None:
        self.weight, self._epsilon, self._shape = weight_H, epsilon, tuple(weight_H.shape)

    @classmethod
    def of(cls, module: Any) -> FastNorm | None:
        """For a module that is an RMSNorm by its name and by what it computes; None for any other."""
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if "RMSNorm" not in type(module).__name__ or not isinstance(epsilon, float) or weight is None:
            return None
        fast = cls(weight, epsilon)
        with torch.inference_mode():
            probe = 3.0 * torch.randn((1, 3, *weight.shape), dtype=weight.dtype, device=weight.device)
            expected = module(probe)
            # transformers rounds twice where the dtype is short, torch once.
            most = max(1e-6, 2.0 * torch.finfo(probe.dtype).eps if probe.dtype is not torch.float32 else 0.0)
            same = expected.dtype == probe.dtype and torch.allclose(fast(probe), expected, rtol=most, atol=most)
        return fast if same else None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``torch.nn.functional.rms_norm``."""
        return F.rms_norm(hidden, self._shape, self.weight, self._epsilon)
