"""The exponential in fp32, for loops that the compiler turns into vector instructions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from cluster.kernels.registers import power_of_two

REORDERS = {"reassoc", "contract", "nsz"}
"""For ``fastmath``: sums may be regrouped; infinities and NaN keep their meaning."""
HIGHEST = np.float32(87.0)
"""Of it and of its negative the exponential is a normal number."""
_LOG2_E, _HALF, _ONE = np.float32(1.4426950408889634), np.float32(0.5), np.float32(1.0)
# Of 2 to the power of -0.5 to 0.5, by its Taylor series: the next term is 5e-9.
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(math.log(2) ** n / math.factorial(n)) for n in range(1, 8))


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def exponential(x: Any) -> Any:
    """e to the power of ``x``, which is from -`HIGHEST` to `HIGHEST` or NaN."""
    whole = np.floor(x * _LOG2_E + _HALF)
    f = x * _LOG2_E - whole
    power = _ONE + f * (_C1 + f * (_C2 + f * (_C3 + f * (_C4 + f * (_C5 + f * (_C6 + f * _C7))))))
    return power * power_of_two(np.int32(whole))
