"""Files of load windows: how many tokens each expert had, window by window. Written by `loads record`, read by `plan`.

{"windows": [{"loads": [[tokens of expert e] per MoE layer], ...}, ...]}, or {"loads": [...]} for one window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluster.errors import InvalidArgument
from cluster.placement.shape import Loads, Slots


def read_windows(path: Path) -> tuple[list[Loads], list[int] | None]:
    """The windows' loads, each [L, E], oldest first; and bytes of one expert by layer, where the file says them.

    Raises:
        InvalidArgument: the file cannot be read, or is not of this form.
    """
    content = _read("--loads", path)
    windows = content.get("windows", [content]) if isinstance(content, dict) else None
    if not isinstance(windows, list) or not windows:
        raise InvalidArgument("--loads", str(path), 'must hold {"windows": [{"loads": ...}]} or {"loads": ...}')
    found = [_loads(path, number, window) for number, window in enumerate(windows)]
    if len({loads.shape for loads in found}) > 1:
        shapes = ", ".join(str(loads.shape) for loads in found[:4])
        raise InvalidArgument("--loads", str(path), f"all windows must have the same layers and experts; has {shapes}")
    sizes = content.get("expert_bytes")
    if sizes is not None and not (
        isinstance(sizes, list)
        and len(sizes) == len(found[0])
        and all(isinstance(size, int) and size > 0 for size in sizes)
    ):
        raise InvalidArgument("--loads", str(path), "expert_bytes must be one positive number for each layer")
    return found, sizes


def _loads(path: Path, number: int, window: Any) -> Loads:
    where = f"window {number} of {path.name}"
    layers = window.get("loads") if isinstance(window, dict) else None
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, list) and layer for layer in layers):
        raise InvalidArgument("--loads", where, "must have loads: a list of tokens by expert for each MoE layer")
    if len({len(layer) for layer in layers}) > 1:
        raise InvalidArgument("--loads", where, "all layers must have the same number of experts")
    try:
        loads_LE = np.array(layers, float)
    except (TypeError, ValueError) as exc:
        raise InvalidArgument("--loads", where, "loads must be numbers") from exc
    if loads_LE.ndim != 2 or not np.isfinite(loads_LE).all() or (loads_LE < 0).any():
        raise InvalidArgument("--loads", where, "loads must be finite numbers from 0 on")
    return loads_LE


def read_plan(path: Path, layers: int, experts: int, slots: int | None = None) -> Slots:
    """The plan of a file that `plan --json` wrote (or its ``phy2log`` alone), [L, S]; of any S where none is given.

    Raises:
        InvalidArgument: the file cannot be read, or is of another shape.
    """
    content = _read("--current", path)
    content = content.get("phy2log") if isinstance(content, dict) else content
    try:
        slots_LS = np.array(content, np.int64)
    except (TypeError, ValueError) as exc:
        raise InvalidArgument("--current", str(path), "must hold phy2log: a list of experts for each layer") from exc
    if slots_LS.ndim != 2 or slots_LS.shape != (layers, slots or slots_LS.shape[1]) or not slots_LS.size:
        count = f"{slots} slots" if slots else "slots"
        raise InvalidArgument("--current", str(path), f"must have {count} in each of {layers} layers")
    if slots_LS.min() < 0 or slots_LS.max() >= experts:
        raise InvalidArgument("--current", str(path), f"names experts that are not from 0 to {experts - 1}")
    return slots_LS


def _read(flag: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as exc:
        raise InvalidArgument(flag, str(path), f"cannot be read: {' '.join(str(exc).split())}") from exc
