"""How the experts of a group compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.kernels.linear import KernelTable
from cluster.weights.dtypes import DTYPE_NAMES


@dataclass(frozen=True, slots=True)
class Compute:
    """How a bank computes: its dtype on the wire, the dtype of its weights ("auto": the same), and with what.

    ``table`` (CPU only) says for how many rows tiles are faster than torch's products.
    """

    dtype: torch.dtype
    device: torch.device
    expert_dtype: str = "auto"
    threads: int = 1
    table: KernelTable | None = None
    memory_bytes: int = 0
    """Budget for experts in memory; 0: all of them."""
    predicts: bool = True
    """Where they do not all fit, some are loaded before a call names them."""
    direct: bool = False
    """Where they do not all fit, they are read past the page cache."""
    from_host: bool = False
    """Where they do not all fit, they come from host memory, which holds all of them: always so beside a GPU."""

    @property
    def exact(self) -> bool:
        """Weights are the checkpoint's in the served dtype."""
        return self.expert_dtype in ("auto", DTYPE_NAMES.get(self.dtype))


def stored_dtype(how: Compute) -> torch.dtype:
    """Weights are read in this one; quantised ones are made from it."""
    return how.dtype if how.exact or how.expert_dtype == "fp32" else torch.float32
