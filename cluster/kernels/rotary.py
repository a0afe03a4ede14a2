"""Rotary position embedding of queries and keys on CPUs: one compiled call instead of a dozen small ones.

The halves of a head are the two coordinates that are turned, as in transformers. J. Su et al., RoFormer: Enhanced
Transformer with Rotary Position Embedding, 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cluster.kernels.team import Team, alone, team

_COMPILED, _FEW = "rotary_compiled", 64 * 1024
"""Floats that one thread turns: a second one takes longer to begin."""

Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(queries [1, heads, T, D], keys [1, kv heads, T, D], cosines [1, T, D], sines [1, T, D], ...) -> both, turned."""


class FastRotary:
    """Stands in for a function of a model's file: for tensors that it can take; others are the function's own."""

    def __init__(self, function: Rotary, few: Team, many: Team) -> None:
        self._function, self._few, self._many = function, few, many

    @classmethod
    def of(cls, function: Rotary, dim: int) -> FastRotary | None:
        """For a function that computes just that for heads of ``dim``, as random ones show; None for any other."""
        many = team(_COMPILED)
        if many is None or dim <= 0 or dim % 2:
            return None
        fast = cls(function, alone(_COMPILED), many)
        with torch.inference_mode():
            query, key = torch.randn(1, 5, 3, dim).transpose(1, 2), torch.randn(1, 5, 2, dim).transpose(1, 2)
            cos, sin = torch.randn(1, 5, dim), torch.randn(1, 5, dim)
            try:
                wanted = function(query, key, cos, sin)
            except (RuntimeError, TypeError, ValueError):
                return None
            got = fast(query, key, cos, sin)
            same = isinstance(wanted, tuple) and len(wanted) == len(got)
            same = same and all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)
                for a, b in zip(wanted, got, strict=True)
            )
        return fast if same else None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Rotary`."""
        if args or kwargs or not _takes(query, key, cos, sin):
            return self._function(query, key, cos, sin, *args, **kwargs)
        _, heads, T, dim = query.shape
        kv_heads = key.shape[1]
        # As what was given lies: a token's heads side by side.
        query_to, key_to = (torch.empty((1, T, num, dim), dtype=torch.float32) for num in (heads, kv_heads))
        numbers = T * (heads + kv_heads) * dim
        many = max(1, T) if numbers <= _FEW else max(1, _FEW // (4 * (heads + kv_heads) * dim))
        run = self._few if numbers <= _FEW else self._many
        run(
            (
                *(T, dim, many, cos.data_ptr(), sin.data_ptr()),
                *(query.data_ptr(), heads, 4 * query.stride(1), 4 * query.stride(2), query_to.data_ptr()),
                *(key.data_ptr(), kv_heads, 4 * key.stride(1), 4 * key.stride(2), key_to.data_ptr()),
            )
        )
        return query_to.transpose(1, 2), key_to.transpose(1, 2)


def _takes(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    if any(t.dtype is not torch.float32 or not t.is_cpu for t in (query, key, cos, sin)):
        return False
    if query.dim() != 4 or key.dim() != 4 or query.stride(3) != 1 or key.stride(3) != 1:
        return False
    _, _, T, dim = query.shape
    angles = (1, T, dim)
    fits = query.shape[0] == 1 and key.shape == (1, key.shape[1], T, dim) and dim % 2 == 0
    return fits and cos.shape == angles and sin.shape == angles and cos.is_contiguous() and sin.is_contiguous()
