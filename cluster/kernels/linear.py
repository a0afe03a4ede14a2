"""Matrix products on CPUs: the library's or our own tiles, whichever is faster for so many rows on this machine.

Decode multiplies a handful of rows with weights that are in no cache, where torch's product takes up to three times as
long as reading them. Which wins for how many rows depends on the CPU; so it is measured when a process starts.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from cluster.kernels.team import Team, alone, team
from cluster.kernels.tiles import TiledWeight, TiledWeights, can_tile, tiled_product

ROWS = (1, 4, 16, 64, 256)
_SIZE, _WEIGHTS, _ROUNDS = 1024, 24, 4
_TIE = 1.05

_NORM, _FEW = "norm_compiled", 32 * 1024
"""Floats that one thread normalises: a second one takes longer to begin."""
SMALL_BYTES = 32 * 1024**2
"""Weights of a process that are no more than this lie in caches, and nothing needs to be measured."""


class KernelTable:
    """``seconds[rows]`` are times of one product: torch's and, where this machine can run it, the tiled one."""

    def __init__(self, seconds: dict[int, tuple[float, float | None]]) -> None:
        self.seconds = dict(sorted(seconds.items()))
        self.tiled_up_to = 0
        """So many rows tiles are best up to, or as good: where what they win up to there is most, all numbers of rows
        counting alike. One at which both are about as fast, or one bad measurement, does not decide for the others."""
        won = most = 0.0
        for rows, (plain, tiled) in self.seconds.items():
            if tiled is None:
                break
            won += math.log(_TIE * plain / tiled)
            if won >= most:
                most, self.tiled_up_to = won, rows if rows < ROWS[-1] else sys.maxsize

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
        self.family: Family | None = None

    @property
    def weight(self) -> torch.Tensor:
        """[N, K]."""
        return self._weight

    @property
    def bias(self) -> torch.Tensor | None:
        """[N]."""
        return self._bias

    @property
    def few(self) -> int:
        """Of so many rows and fewer its products are tiled."""
        return self._few

    @property
    def tiles(self) -> bool:
        """Its products are tiled, if not for every number of rows."""
        return self._few > 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``F.linear(x, weight, bias)``."""
        rows = x.numel() // self._inputs
        if not 0 < rows <= self._few:
            return F.linear(x, self._weight, self._bias)
        product = self.family.product(self, x) if self.family is not None else None
        if product is None:
            product = self._tiled.product(x.reshape(rows, self._inputs))
        if self._bias is not None:
            product += self._bias
        return product.view(*x.shape[:-1], self._outputs)


class Family:
    """Linear layers of one module that may get the same rows, as those of queries, keys and values do: then the first
    one's call computes the products of all.

    Who gets what the first one got is seen in a round of calls, from one call of the first one to its next. Used by one
    thread at a time.
    """

    def __init__(self, members: Sequence[FastLinear]) -> None:
        for member in members:
            member.family = self
        self._members = list(members)
        self._first: FastLinear | None = None
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None
        """While it is not known: what the first one got, and a copy of it."""
        self._others: list[FastLinear] = []
        self._weights: TiledWeights | None = None
        self._rows: torch.Tensor | None = None
        self._products: dict[int, torch.Tensor] = {}

    def product(self, member: FastLinear, x: torch.Tensor) -> torch.Tensor | None:
        """[R, N], without bias; None where the member has to compute it."""
        if self._weights is None:
            self._learn(member, x)
            return None
        if member is not self._first:
            known = self._products.pop(id(member), None) if x is self._rows else None
            if not self._products:
                self._rows = None
            return known
        own, *others = self._weights.products(x.reshape(-1, x.shape[-1]))
        self._products = {id(other): product for other, product in zip(self._others, others, strict=True)}
        self._rows = x  # kept, so that no other tensor is taken for it
        return own

    def _learn(self, member: FastLinear, x: torch.Tensor) -> None:
        if self._first is None:
            self._first, self._seen = member, (x, x.clone())
        elif member is self._first:
            if self._others:
                self._weights = TiledWeights([member.weight, *(other.weight for other in self._others)])
            else:
                self._disband()
            self._seen = None
        else:
            assert self._seen is not None
            same = x is self._seen[0] and torch.equal(x, self._seen[1])  # and nobody has changed it in the meantime
            if same and member not in self._others:
                self._others.append(member)
            elif not same:
                member.family = None

    def _disband(self) -> None:
        for member in self._members:
            member.family = None


class FastNorm:
    """Stands in for one RMSNorm module of transformers: one compiled call in fp32 on CPUs, elsewhere one of torch's,
    instead of six."""

    def __init__(self, weight_H: torch.Tensor, epsilon: float) -> None:
        self.weight, self._epsilon, self._shape = weight_H, epsilon, tuple(weight_H.shape)
        self._run: tuple[Team, Team] | None = None
        if weight_H.is_cpu and weight_H.dtype is torch.float32 and weight_H.dim() == 1 and weight_H.is_contiguous():
            many = team(_NORM)
            self._run = None if many is None else (alone(_NORM), many)
        self._epsilon_here = ctypes.c_float(epsilon)
        self.weight_at, self.epsilon_at = weight_H.data_ptr(), ctypes.addressof(self._epsilon_here)

    @property
    def compiled(self) -> bool:
        """It is one of ours and not torch's."""
        return self._run is not None

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
        if self._run is None or not hidden.is_contiguous() or hidden.dtype is not torch.float32 or not hidden.is_cpu:
            return F.rms_norm(hidden, self._shape, self.weight, self._epsilon)
        (size,) = self._shape
        if hidden.shape[-1] != size:
            raise ValueError(f"rows: got {tuple(hidden.shape)}; must be [..., {size}]")
        result = torch.empty_like(hidden)
        numbers, rows = hidden.numel(), hidden.numel() // size
        small = numbers <= _FEW
        many = max(1, rows if small else _FEW // size)
        run = self._run[0 if small else 1]
        run((hidden.data_ptr(), self.weight_at, result.data_ptr(), size, rows, many, self.epsilon_at))
        return result
