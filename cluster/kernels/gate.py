"""Gates that take the best experts of a softmax, on CPUs: one compiled call instead of a dozen small ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from cluster.kernels.team import Team, alone, team
from cluster.kernels.tiles import can_tile

_COMPILED, _FEW = "gate_compiled", 1024 * 1024
"""Products that one thread does: a second one takes longer to begin."""
_ROWS = 12
"""Rows of one piece of work."""
_PROBES = 3
"""By chance two experts may be as good for a random row, and then either may come first."""

Chosen = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class FastGate:
    """Stands in for one module of transformers that makes of rows [..., H] a tuple: scores [T, E], the weights of the
    best ``count`` of their softmax, in order, [T, K], and which experts these are, int64 [T, K]."""

    def __init__(
        self, own: Callable[..., Chosen], weight_EH: torch.Tensor, count: int, normalise: bool, many: Team
    ) -> None:
        self._own, self.weight, self._count, self._normalise = own, weight_EH, count, normalise
        self._few, self._many = alone(_COMPILED), many
        self._experts, self._hidden = weight_EH.shape

    @classmethod
    def of(cls, module: Any) -> FastGate | None:
        """For a module with a weight [E, H] in fp32 on the CPU and a ``top_k`` that computes just that, as random rows
        show; None for any other."""
        weight, count = getattr(module, "weight", None), getattr(module, "top_k", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or type(count) is not int:
            return None
        if not 0 < count <= weight.shape[0] or not can_tile(weight):
            return None
        many = team(_COMPILED)
        if many is None:
            return None
        for normalise in (True, False):
            fast = cls(module.forward, weight.detach(), count, normalise, many)
            if any(_same(module, fast) for _ in range(_PROBES)):
                return fast
        return None

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Chosen:
        """Of rows in fp32 on the CPU; the module's own way for any others, and for a few rows of a large gate, which
        torch divides among threads by its outputs."""
        fits = hidden.is_cpu and hidden.dtype is torch.float32 and hidden.is_contiguous()
        if args or kwargs or not fits or hidden.shape[-1] != self._hidden:
            return self._own(hidden, *args, **kwargs)
        E, H, k = self._experts, self._hidden, self._count
        T = hidden.numel() // H
        few = T * E * H <= _FEW
        if not few and _ROWS * torch.get_num_threads() > T:
            return self._own(hidden)
        scores_TE, shares_TE = (torch.empty((T, E), dtype=torch.float32) for _ in range(2))
        weights_TK, index_TK = torch.empty((T, k), dtype=torch.float32), torch.empty((T, k), dtype=torch.int64)
        rows = max(1, T) if few else _ROWS
        places = (scores_TE.data_ptr(), shares_TE.data_ptr(), weights_TK.data_ptr(), index_TK.data_ptr())
        run = self._few if few else self._many
        run((hidden.data_ptr(), self.weight.data_ptr(), *places, T, H, E, k, int(self._normalise), rows))
        return scores_TE, weights_TK, index_TK


def _same(module: Any, fast: FastGate) -> bool:
    with torch.inference_mode():
        probe = torch.randn(2 * _ROWS, fast.weight.shape[1])
        probe[0] *= 5  # where few experts have nearly all
        try:
            wanted = module(probe)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it wants something else beside
            return False
        if not (isinstance(wanted, tuple) and len(wanted) == 3 and all(isinstance(t, torch.Tensor) for t in wanted)):
            return False
        got = fast(probe)
        if any(a.shape != b.shape or a.dtype is not b.dtype for a, b in zip(wanted, got, strict=True)):
            return False
        most = float(wanted[0].abs().max())
        if not math.isfinite(most):  # weights that are no numbers
            return False
        close = torch.allclose(wanted[0], got[0], rtol=1e-4, atol=1e-5 * most)
        return close and torch.equal(wanted[2], got[2]) and torch.allclose(wanted[1], got[1], rtol=1e-4, atol=1e-6)
