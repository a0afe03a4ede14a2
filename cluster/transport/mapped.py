"""Memory that two processes map: how it is sealed, mapped and written to."""

from __future__ import annotations

import ctypes
import fcntl
import mmap

import torch

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""The memory can neither shrink nor grow under the other end, which would be a SIGBUS there."""


def map_memory(fd: int, size: int) -> mmap.mmap:
    """Maps shared memory for reading and writing."""
    return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def copy_out(tensor: torch.Tensor, address: int, num_bytes: int) -> None:
    """Copies a contiguous CPU tensor to an address of this process that has room for it, without torch's and numpy's
    overhead for a call, which is more than the copy of a few rows takes."""
    ctypes.memmove(address, tensor.data_ptr(), num_bytes)
