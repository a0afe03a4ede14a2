"""The same tensors through Ray: a Serve handle and an actor, beside the transports, in one interleaved run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from cluster.bench.dispatch import Caller, Measured, connect, echo_process, interleave, layer_rows, on_first_core

SHAPE = (8, 2048)
CALL_TIMEOUT_S = 30.0
APP = "expertmesh-bench"


class _Echo:
    """What both carry calls to."""

    def echo(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows again."""
        return rows


class _AsyncEcho:
    """Serve's deployments are asyncio: a plain method would go through a thread pool."""

    async def echo(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows again."""
        return rows


def measure_handles(kinds: Sequence[str], samples: int, seconds: float) -> dict[str, Any]:
    """Medians of a Serve handle call, a Ray actor call (both with default options) and each transport, in µs, at 8
    tokens x 2048. Ray and Serve run already, and their daemons share the cores with everything that is measured here.
    """
    rows = layer_rows(*SHAPE)
    make: Any = serve.deployment
    application = make(_AsyncEcho, num_replicas=1, ray_actor_options={"num_cpus": 0.05}).bind()
    handle: Any = serve.run(application, name=APP, route_prefix=None)
    actor: Any = ray.remote(num_cpus=0.05)(_Echo).remote()
    contenders: dict[str, Measured] = {
        "serve_handle": lambda: handle.echo.remote(rows.hidden_TH).result(timeout_s=CALL_TIMEOUT_S),
        "ray_actor": lambda: ray.get(actor.echo.remote(rows.hidden_TH), timeout=CALL_TIMEOUT_S),
    }
    try:
        with on_first_core() as other, echo_process("group", other) as group, contextlib.ExitStack() as links:
            for kind in kinds:
                link = connect(kind, group)
                links.callback(link.close)
                contenders[kind] = Caller(link, rows)
            times = interleave(contenders, samples, seconds)
    finally:
        ray.kill(actor)
        serve.delete(APP)
    medians = {name: round(float(np.median(values)) * 1e6, 1) for name, values in times.items()}
    return {
        "serve_handle_p50_us": medians["serve_handle"],
        "ray_actor_p50_us": medians["ray_actor"],
        "beside_ray": [
            {
                "transport": kind,
                "p50_us": medians[kind],
                "serve_handle_ratio": round(medians["serve_handle"] / medians[kind], 2),
                "ray_actor_ratio": round(medians["ray_actor"] / medians[kind], 2),
                "samples": len(times[kind]),
            }
            for kind in kinds
        ],
    }
