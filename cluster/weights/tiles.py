"""Products of a few rows each with many weights as the checkpoint lays them out, in one call and by all threads.

Decode reads every weight once for one to some sixteen rows, so memory should set the pace. A library call an expert
costs more in calls than it reads in time, and a layout of its own doubles the memory. Here one compiled function goes
through all experts of a call, a tile of outputs and rows in registers at a time; each thread takes the next piece of
work when it is done with one, and the threads are those that torch has anyway: libgomp runs the function as it runs
torch's parallel loops.

Tiling for registers: K. Goto and R. van de Geijn, Anatomy of High-Performance Matrix Multiplication, ACM TOMS 34(3),
2008, for the case where one side is a few rows and nothing needs to be copied for caches.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch

log = logging.getLogger(__name__)

OUTPUTS, INPUTS = 4, 16
"""Outputs and inputs of a weight must be multiples of these."""
PIECE = 32
"""Outputs of one expert that a thread takes at a time: 128 KiB of weights with 1024 inputs."""
HEADER = 8
"""Numbers before the slots in what describes a call's work."""


def can_tile(weight: torch.Tensor) -> bool:
    """`tiled_product` takes this weight ([S, N, K] or one of them), and this machine can run it."""
    fits = weight.is_cpu and weight.dtype is torch.float32 and weight.is_contiguous()
    outputs, inputs = weight.shape[-2:]
    return fits and outputs % OUTPUTS == 0 and inputs % INPUTS == 0 and _kernel() is not None


def tiled_product(
    x_PK: torch.Tensor, weight_SNK: torch.Tensor, slots: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """[P, N], fp32: the first ``counts[0]`` rows times the transpose of weight ``slots[0]``, and so on, with as many
    threads as the calling one has. ``weight_SNK`` is one that `can_tile` has accepted.

    Raises:
        ValueError: a slot does not exist, or the rows are not as many or as long as they must be.
    """
    kernel = _kernel()
    assert kernel is not None
    num_slots, outputs, inputs = weight_SNK.shape
    x_PK, num = x_PK.contiguous(), len(slots)
    work = np.zeros(HEADER + 2 * num + 2, np.int64)  # ends with what the threads count pieces with
    work[HEADER : HEADER + num] = slots
    np.cumsum(counts, out=work[HEADER + num + 1 : -1])
    if x_PK.shape != (work[-2], inputs) or x_PK.dtype is not torch.float32:
        raise ValueError(f"rows: got {tuple(x_PK.shape)} of {x_PK.dtype}; must be [{work[-2]}, {inputs}] of float32")
    if num and not (0 <= min(slots) <= max(slots) < num_slots and min(counts) >= 0):
        raise ValueError(f"slots: got {list(slots)} with {list(counts)} rows; must be below {num_slots}")
    result = torch.empty((len(x_PK), outputs), dtype=torch.float32)
    at = work.ctypes.data
    addresses = (at + work.nbytes - work.itemsize, x_PK.data_ptr(), weight_SNK.data_ptr(), result.data_ptr())
    work[:HEADER] = (*addresses, inputs, outputs, num, -(-outputs // PIECE))
    kernel(at)
    return result


@functools.cache
def _kernel() -> Callable[[int], None] | None:
    """Runs the compiled function with torch's threads; None where those are not libgomp's, or nothing compiles."""
    try:
        team = ctypes.CDLL("libgomp.so.1").GOMP_parallel  # by this name it is the one that torch has loaded
        from cluster.weights.tile_kernel import run_pieces
    except (OSError, AttributeError, ImportError) as exc:
        log.warning("products of few rows go through torch alone, which is slower: %s", exc)
        return None
    team.argtypes, team.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    address = run_pieces.address
    return lambda work: team(address, work, torch.get_num_threads(), 0)
