"""`expertmesh zoo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.common import Json, emit, reporting, stdout


def zoo_list(as_json: Json = False) -> None:
    """List architectures, presets and layouts."""
    from cluster.weights.layouts import LAYOUTS
    from cluster.weights.zoo import PRESETS, architectures

    if as_json:
        emit({"architectures": architectures(), "presets": list(PRESETS), "layouts": list(LAYOUTS)})
        return
    stdout.print("architectures: " + ", ".join(architectures()))
    stdout.print("presets: " + ", ".join(PRESETS) + " (bench-700m is qwen3_moe)")
    stdout.print("layouts: " + ", ".join(LAYOUTS))


def zoo_make(
    arch: Annotated[str, typer.Option(help="Architecture; see `zoo list`.")],
    out: Annotated[Path, typer.Option(help="New or empty directory.")],
    preset: Annotated[str, typer.Option(help="tiny or bench-700m.")] = "tiny",
    seed: Annotated[int, typer.Option(help="The same seed gives the same weights.")] = 0,
    layout: Annotated[str, typer.Option(help="per-expert, fused, sharded or fp8.")] = "per-expert",
    as_json: Json = False,
) -> None:
    """Write a random-weight checkpoint in the Hugging Face layout."""
    from transformers.utils import logging as transformers_logging

    from cluster.weights.zoo import make_model

    transformers_logging.disable_progress_bar()
    with reporting() as progress:
        make_model(arch, preset, seed, out, layout, progress)
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        emit({"arch": arch, "preset": preset, "seed": seed, "layout": layout, "out": str(out), "bytes": size})
    else:
        stdout.print(f"{out}: {size / 1024**2:.1f} MiB")
