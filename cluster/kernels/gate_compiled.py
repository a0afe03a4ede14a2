"""What `cluster.kernels.gate` runs: scores, softmax and the best experts of a few rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.exponential import HIGHEST, REORDERS, exponential
from cluster.kernels.registers import floats, longs, next_piece
from cluster.kernels.tiles_compiled import multiply

_ONE, _TAKEN = np.float32(1.0), np.float32(-1.0)


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def _softmax(scores: Any, shares: Any, n: int) -> None:
    highest = scores[0]
    for i in range(1, n):
        highest = max(highest, scores[i])
    total = np.float32(0.0)
    for i in range(n):
        x = scores[i] - highest
        share = exponential(-HIGHEST if x < -HIGHEST else x)
        shares[i] = share
        total += share
    factor = _ONE / total
    for i in range(n):
        shares[i] *= factor


@njit  # type: ignore[untyped-decorator]
def _take_best(shares: Any, n: int, weights: Any, index: Any, k: int) -> None:
    """The k largest, in order, of equal ones the first; they are no longer there afterwards."""
    for place in range(k):
        best = -1
        for i in range(n):
            if shares[i] != _TAKEN and (best < 0 or shares[i] > shares[best]):
                best = i
        weights[place] = shares[best]
        index[place] = best
        shares[best] = _TAKEN


def _choose(work: Any) -> None:
    x_at, w_at, scores_at, shares_at, weights_at, index_at = work[1], work[2], work[3], work[4], work[5], work[6]
    T, H, E, k, normalise, many = work[7], work[8], work[9], work[10], work[11], work[12]
    while True:
        first = next_piece(work[0]) * many
        if first >= T:
            break
        last = min(first + many, T)
        multiply(x_at, H * 4, first, last, w_at, 4, 0, 0, E, scores_at, E, H, w_at)
        for row in range(first, last):
            shares, weights = floats(shares_at + row * E * 4), floats(weights_at + row * k * 4)
            _softmax(floats(scores_at + row * E * 4), shares, E)
            _take_best(shares, E, weights, longs(index_at + row * k * 8), k)
            if normalise != 0:
                total = np.float32(0.0)
                for place in range(k):
                    total += weights[place]
                for place in range(k):
                    weights[place] /= total


run = compiled(_choose)
