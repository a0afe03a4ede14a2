"""Names of dtypes as users and the wire know them, and torch's."""

from __future__ import annotations

import torch

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def resolve_dtype(wanted: str, checkpoint: torch.dtype, on_gpu: bool) -> torch.dtype:
    """``auto`` is the checkpoint's dtype on GPUs and fp32 on CPUs (most CPUs compute bf16 more slowly than fp32)."""
    if wanted != "auto":
        return TORCH_DTYPES[wanted]
    return checkpoint if on_gpu and checkpoint in DTYPE_NAMES else torch.float32


def pick_device(wanted: str) -> torch.device:
    """``auto`` is the GPU that this process was given, if it was given one and torch can use it, else the CPU."""
    if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", 0)
    return torch.device("cpu")


def settle(device: torch.device) -> None:
    """Waits until what the calling thread has queued on a GPU is done, so that whoever reads a clock next reads the
    work's own end; nothing on CPUs."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
