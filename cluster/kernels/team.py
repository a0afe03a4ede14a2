"""Compiled functions, run by the threads that torch has anyway: libgomp runs them as it runs torch's parallel loops.

Threads of another library would wait for work on the cores that torch's need, and the other way round.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
from collections.abc import Callable, Sequence

import torch

log = logging.getLogger(__name__)

_PAUSE_SOFT = 1  # omp_pause_soft: what the program has computed stays

Team = Callable[[Sequence[int]], None]
"""Runs a function on some numbers. Before them it finds the address of a counter, which is 0."""
Work = ctypes.Array[ctypes.c_int64]
"""The numbers of a call behind the address of a counter, and the counter."""
Kept = Callable[[Work], None]
"""Runs a function on numbers that somebody keeps from call to call, one call at a time."""


def work_of(numbers: Sequence[int]) -> Work:
    """What a `Kept` takes; number ``i`` is at ``i + 1``."""
    # Of Python's own sequences: numpy's arrays take longer to make than a product of one row.
    size = len(numbers) + 2
    work = (ctypes.c_int64 * size)(0, *numbers, 0)
    work[0] = ctypes.addressof(work) + 8 * (size - 1)
    return work


@functools.cache
def team(module: str, name: str = "run") -> Team | None:
    """Of a compiled function of a module of this package; None where torch's threads are not libgomp's, or nothing can
    be compiled. What is compiled is kept for the next process."""
    run = kept_team(module, name)
    return None if run is None else lambda numbers: run(work_of(numbers))


@functools.cache
def kept_team(module: str, name: str = "run") -> Kept | None:
    """The same, for numbers that are kept."""
    try:
        parallel = ctypes.CDLL("libgomp.so.1").GOMP_parallel  # by this name it is the one that torch has loaded
        address = address_of(module, name)
    except (OSError, AttributeError, ImportError) as exc:
        log.warning("%s is not used, which is slower: %s", module, exc)
        return None
    parallel.argtypes, parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None

    def run(work: Work) -> None:
        work[-1] = 0
        parallel(address, work, torch.get_num_threads(), 0)

    return run


@functools.cache
def alone(module: str, name: str = "run") -> Team:
    """Of the same function, run by the calling thread. For what takes no longer than a thread to wake up."""
    run = kept_alone(module, name)
    return lambda numbers: run(work_of(numbers))


@functools.cache
def kept_alone(module: str, name: str = "run") -> Kept:
    """The same, for numbers that are kept."""
    # It keeps the interpreter's lock, since to give it away and get it back takes as long.
    return _kept(ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address_of(module, name)))


@functools.cache
def kept_waiting(module: str, name: str) -> Kept:
    """As `kept_alone`, of a function that waits, or moves much: it gives the interpreter's lock away."""
    return _kept(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address_of(module, name)))


def _kept(call: Callable[[Work], object]) -> Kept:
    def run(work: Work) -> None:
        work[-1] = 0
        call(work)

    return run


def release_team() -> None:
    """Ends the threads that the calling thread's parallel loops have had; the next loop starts them again. For a thread
    that has loaded what another one computes with.

    While a process has more of such threads than there are cores, libgomp's wait asleep after every loop, whatever
    `GOMP_SPINCOUNT` says: a decoding step of bench-700m on two cores, sixty such loops, then took a tenth longer.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(_PAUSE_SOFT)


def address_of(module: str, name: str) -> int:
    """Of a compiled function of a module of this package."""
    address: int = getattr(importlib.import_module(f"cluster.kernels.{module}"), name).address
    return address
