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
        self._reader, self._layers, self._threads = reader, layers, threads
        self._experts: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in layers]
        for number, experts in enumerate(holdings):
            self.hold(number, experts)

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory."""
        held = [tensors for experts in self._experts for tensors in experts.values()]
        return sum(t.numel() * t.element_size() for tensors in held for t in tensors.values())

    def hold(self, layer: int, experts: Sequence[int]) -> None:
        """From now on these of a layer are here, and no others."""
        held = self._experts[layer]
        added = [expert for expert in experts if expert not in held]
        tensors = self._reader.read(self._layers[layer], added, self._threads) if added else {}
        fresh = {
            expert: {name: self._own(tensor[place]) for name, tensor in tensors.items()}
            for place, expert in enumerate(added)
        }
        self._experts[layer] = {expert: fresh.get(expert) or held[expert] for expert in experts}

    def _own(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in memory of its own, which goes when the expert does."""
        return tensor.pin_memory() if self._stream is not None else tensor.clone()

    def fill(self, layer: int, expert: int, target: Target) -> None:
        """Copies one expert into a slot, and returns when it is there."""
        tensors = self._experts[layer][expert]
        if self._stream is None:
            for name, slot in target.tensors.items():
                slot.copy_(tensors[name])
            return
        # Kernels of the expert that was in this slot may still be queued on the compute thread's stream.
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, slot in target.tensors.items():
                slot.copy_(tensors[name], non_blocking=True)
        self._stream.synchronize()
