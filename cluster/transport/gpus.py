"""What NVIDIA's management library knows of two GPUs of this host: how they reach each other."""

from __future__ import annotations

import ctypes
from typing import Any

import torch


def pci_address(device: torch.device) -> str:
    """PCI address of a CUDA device, such as "0000:3b:00"; empty for a CPU."""
    if device.type != "cuda":
        return ""
    facts: Any = torch.cuda.get_device_properties(device)
    return f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}"


def path_between(one: str, other: str) -> str:
    """ "NVLink", "PCIe peer access" or "host memory" for two GPUs that this host sees; empty where it cannot tell, and
    for one and the same. It is for people to read: nothing that goes wrong here keeps a link from being made."""
    if one == other:
        return ""
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        try:
            handles = [pynvml.nvmlDeviceGetHandleByPciBusId(f"{address}.0".encode()) for address in (one, other)]
            for name, caps in (
                ("NVLink", pynvml.NVML_P2P_CAPS_INDEX_NVLINK),
                ("PCIe peer access", pynvml.NVML_P2P_CAPS_INDEX_READ),
            ):
                if pynvml.nvmlDeviceGetP2PStatus(*handles, _number(caps)) == pynvml.NVML_P2P_STATUS_OK:
                    return name
            return "host memory"
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, ctypes.ArgumentError, AttributeError):
        return ""  # another host's GPU, a container that hides it, or a library of another version


def _number(constant: Any) -> int:
    """nvidia-ml-py (13.615, and before) says ``NVML_P2P_CAPS_INDEX_READ = 0,``, which is a tuple."""
    return int(constant[0] if isinstance(constant, tuple) else constant)
