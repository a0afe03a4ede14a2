"""Compiles functions that a team of threads runs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import cfunc, config, types


def compiled(function: Callable[[Any], None]) -> Any:
    """A function of int64 numbers. It is kept beside its source or in the user's cache, where either can be written."""
    signature = types.void(types.CPointer(types.int64))
    before, place = config.CACHE_DIR, _place(config.CACHE_DIR)
    if place is None:
        return cfunc(signature)(function)
    config.CACHE_DIR = str(place)
    try:
        return cfunc(signature, cache=True)(function)
    finally:
        config.CACHE_DIR = before


@functools.cache
def _place(wanted: str) -> Path | None:
    """A directory for what is made of exactly these sources; None where none can be written. numba looks at the file of
    a function alone, but what is compiled holds constants and functions of others."""
    here = Path(__file__).parent
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "expertmesh"
    for parent in (Path(wanted),) if wanted else (here / "__pycache__", user):
        place = parent / f"kernels-{digest(here)}"
        if str(parent).startswith("~"):  # whoever runs this has no home
            continue
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    return None


def digest(directory: Path) -> str:
    """Of all sources in a directory."""
    found = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
