"""`expertmesh demo`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.commands.common import Json, emit, reporting, stdout, stopping
from cluster.config import load_config


def demo(
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "ROMEO.\nBut soft, what light",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 60,
    as_json: Json = False,
) -> None:
    """Serve the embedded model over two expert groups, stream one answer, show where its time went, stop everything."""
    from cluster import app as composition
    from cluster.bench.demo import show_stages, stream_answer
    from cluster.plan import make_plan

    out = None if as_json else sys.stdout  # a Ray session puts another stream in place of it
    settings = load_config(flags={"listen": "127.0.0.1:0", "groups": 2})
    with stopping() as stop:
        with reporting() as progress:
            progress("checking the embedded model")
            plan = make_plan(settings)
            with composition.RaySession(settings, progress):
                stop.arm()
                deployment = composition.deploy(plan, progress)
                progress(f"serving on {deployment.address}; asking over gRPC")
                answer = stream_answer(deployment.address, prompt, max_new_tokens, out)
                progress("stopping")
                deployment.drain(5)
                deployment.remove()
    if as_json:
        emit(answer.as_json())
    else:
        show_stages(stdout, answer)
