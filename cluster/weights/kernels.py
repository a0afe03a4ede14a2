"""Matrix products with few rows on CPUs: which library kernel for how many rows, and weights laid out for it.

Decode multiplies a handful of rows with weights that are in no cache. The same product by different routes of the same
libraries differs by a factor of two to three, and which route wins depends on rows, threads and CPU; so it is measured
when a process starts, and not assumed.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

PLAIN, SPLIT, PACKED = "plain", "split", "packed"
ROWS = (1, 2, 3, 4, 6, 8, 16, 32)
_SIZE, _WEIGHTS, _ROUNDS, _SPLITS = 1024, 24, 8, 8
_PACK_HINT = 16  # rows that oneDNN lays weights out for; hints from 2 to 16 came out equal

SMALL_BYTES = 32 * 1024**2
"""Weights of a process that are no more than this lie in caches, and nothing needs to be measured."""

_pack = torch.ops.mkldnn._reorder_linear_weight
_packed_linear = torch.ops.mkldnn._linear_pointwise.default


def can_pack(weight: torch.Tensor) -> bool:
    """oneDNN has a layout of its own for this weight."""
    return (
        weight.is_cpu and weight.dtype is torch.float32 and weight.dim() == 2 and torch.backends.mkldnn.is_available()
    )


def pack(weight_NK: torch.Tensor) -> torch.Tensor:
    """The weight in oneDNN's blocked layout (a copy, opaque)."""
    packed: torch.Tensor = _pack(weight_NK.contiguous(), _PACK_HINT)
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` with a weight of `pack`."""
    result: torch.Tensor = _packed_linear(x, packed, bias, "none", [], "")
    return result


def can_split(weight_NK: torch.Tensor) -> bool:
    """`split_linear` takes this weight."""
    return weight_NK.shape[0] % _SPLITS == 0 and weight_NK.is_contiguous() and weight_NK.is_cpu


def split_linear(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """``F.linear`` without bias, with all threads: a batch of small products is spread over threads even where one
    product of few rows is not."""
    outputs, inputs = weight_NK.shape
    parts = weight_NK.view(_SPLITS, outputs // _SPLITS, inputs).transpose(1, 2)
    product = torch.bmm(x_MK.expand(_SPLITS, *x_MK.shape), parts)
    return product.view(1, outputs) if len(x_MK) == 1 else product.transpose(0, 1).reshape(len(x_MK), outputs)


class KernelTable:
    """The fastest kernel for a number of rows. ``seconds[rows][kernel]`` are times of one product."""

    def __init__(self, seconds: dict[int, dict[str, float]]) -> None:
        self.seconds = dict(sorted(seconds.items()))
        self._rows = list(self.seconds)

    @classmethod
    def measure(cls, clock: Callable[[], float] = time.perf_counter) -> KernelTable:
        """Times all kernels with the calling thread's number of threads, on weights that no cache holds. Less than a
        second; takes 200 MB meanwhile."""
        weights = [torch.randn(_SIZE, _SIZE) for _ in range(_WEIGHTS)]
        packed = [pack(weight) for weight in weights] if can_pack(weights[0]) else []
        seconds: dict[int, dict[str, float]] = {}
        with torch.inference_mode():
            for rows in ROWS:
                x = torch.randn(rows, _SIZE)
                routes: dict[str, Callable[[torch.Tensor, int], Any]] = {
                    PLAIN: lambda x, i: F.linear(x, weights[i]),
                    SPLIT: lambda x, i: split_linear(x, weights[i]),
                }
                if packed:
                    routes[PACKED] = lambda x, i: packed_linear(x, packed[i])
                seconds[rows] = {name: _quick(partial(route, x), clock) for name, route in routes.items()}
        return cls(seconds)

    def best(self, rows: int, among: Sequence[str]) -> str:
        """The fastest of ``among`` for so many rows."""
        at = self._rows[max(0, bisect.bisect_right(self._rows, rows) - 1)]
        times = self.seconds[at]
        return min((name for name in among if name in times), key=times.__getitem__, default=PLAIN)

    def plain_up_to(self, handicap_s: float) -> int:
        """So many rows the plain kernel is best up to, when each packed product costs ``handicap_s`` more than was
        measured; 0 if it is not even for one."""
        last = 0
        for rows, times in self.seconds.items():
            if times.get(PACKED, float("inf")) + handicap_s < times[PLAIN]:
                return last
            last = rows
        return last


def _quick(route: Callable[[int], Any], clock: Callable[[], float]) -> float:
    """A low quartile: what else runs on the machine only adds."""
    times = []
    for i in range(2 * _ROUNDS):
        started = clock()
        route(i % _WEIGHTS)
        times.append(clock() - started)
    return sorted(times)[_ROUNDS // 2]


class FastLinear:
    """Stands in for one ``nn.Linear`` on the CPU: the kernel that is best for the rows of each call.

    Keeps the plain weight, which is the module's, and a packed copy where that wins for any number of rows.
    """

    def __init__(self, weight_NK: torch.Tensor, bias: torch.Tensor | None, table: KernelTable) -> None:
        self._weight, self._bias = weight_NK, bias
        self._inputs, self._outputs = weight_NK.shape[1], weight_NK.shape[0]
        kinds = [PLAIN]
        if can_split(weight_NK):
            kinds.append(SPLIT)
        if can_pack(weight_NK):
            kinds.append(PACKED)
        self._kinds = [table.best(rows, kinds) for rows in range(ROWS[-1] + 1)]
        self._packed = pack(weight_NK) if PACKED in self._kinds else None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed copy."""
        return self._weight.nbytes if self._packed is not None else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``F.linear(x, weight, bias)``."""
        rows = x.numel() // self._inputs
        kind = self._kinds[min(rows, ROWS[-1])]
        if kind is PACKED:
            return packed_linear(x, self._packed, self._bias)  # type: ignore[arg-type]
        if kind is PLAIN or not rows:
            return F.linear(x, self._weight, self._bias)
        product = split_linear(x.reshape(rows, self._inputs), self._weight)
        if self._bias is not None:
            product = product + self._bias
        return product.reshape(*x.shape[:-1], self._outputs)


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
