"""Compiles functions that a team of threads runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import cfunc, types


def compiled(function: Callable[[Any], None]) -> Any:
    """A function of int64 numbers. It is kept beside its source or in the user's cache, where either can be written."""
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # nowhere to keep what was compiled
        return cfunc(signature)(function)
