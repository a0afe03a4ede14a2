"""What `cluster.kernels.linear.FastNorm` runs on CPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.exponential import REORDERS
from cluster.kernels.registers import floats, next_piece

_ONE, _ZERO = np.float32(1.0), np.float32(0.0)


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def norm(x: Any, weights: Any, y: Any, n: int, epsilon: Any) -> None:
    total = _ZERO
    for i in range(n):
        total += x[i] * x[i]
    scale = _ONE / np.sqrt(total / np.float32(n) + epsilon)
    for i in range(n):
        y[i] = x[i] * scale * weights[i]


def _rows(work: Any) -> None:
    x_at, w_at, y_at, n, rows, many, epsilon = work[1], work[2], work[3], work[4], work[5], work[6], floats(work[7])[0]
    while True:
        first = next_piece(work[0]) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            norm(floats(x_at + row * n * 4), floats(w_at), floats(y_at + row * n * 4), n, epsilon)


run = compiled(_rows)
