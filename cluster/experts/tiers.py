"""Where experts come from that are not in compute memory: the disk (`cluster.weights.reader`), or host memory.

Beside a GPU all of a group's experts are read once, into pinned host memory, and copied to the GPU on a stream of its
own when they are called for or will be; the process sits on the GPU's NUMA node, and so does what it allocates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cluster.weights.reader import ExpertReader, Target
from cluster.weights.skeleton import MoeLayer


class HostTier:
    """Experts of ``holdings`` in host memory, by MoE layer. One thread, the store's, fills."""

    def __init__(
        self,
        reader: ExpertReader,
        layers: Sequence[MoeLayer],
        holdings: Sequence[Sequence[int]],
        device: torch.device,
        threads: int,
    ) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._at: list[dict[int, int]] = [{e: i for i, e in enumerate(experts)} for experts in holdings]
        self._tensors: list[dict[str, torch.Tensor]] = []
        for layer, experts in zip(layers, holdings, strict=True):
            tensors = reader.read(layer, list(experts), threads)
            pinned = self._stream is not None
            self._tensors.append({name: tensor.pin_memory() if pinned else tensor for name, tensor in tensors.items()})

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(t.numel() * t.element_size() for tensors in self._tensors for t in tensors.values())

    def fill(self, layer: int, expert: int, target: Target) -> None:
        """Copies one expert into a slot, and returns when it is there."""
        at, tensors = self._at[layer][expert], self._tensors[layer]
        if self._stream is None:
            for name, slot in target.tensors.items():
                slot.copy_(tensors[name][at])
            return
        # Kernels of the expert that was in this slot may still be queued on the compute thread's stream.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, slot in target.tensors.items():
                slot.copy_(tensors[name][at], non_blocking=True)
        self._stream.synchronize()
