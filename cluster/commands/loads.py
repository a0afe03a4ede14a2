"""`expertmesh loads`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.commands.common import DEFAULT_SERVER, Json, Server, emit, reporting, stdout
from cluster.errors import ConfigError, InvalidArgument, Unavailable

_NAMES = ("decode_tokens", "prefill_tokens", "activations")


def record(
    out: Annotated[Path, typer.Option(help="Where the windows go, for `plan`.")],
    windows: Annotated[int, typer.Option(help="Windows, one after the other.")] = 2,
    seconds: Annotated[float, typer.Option(help="Length of a window.")] = 30.0,
    server: Server = DEFAULT_SERVER,
    as_json: Json = False,
) -> None:
    """Record how many tokens each expert gets from a running server, window by window."""
    from cluster.api.client import Client

    for name, value, least in (("--windows", windows, 1), ("--seconds", seconds, 0.1)):
        if value < least:
            raise InvalidArgument(name, value, f"must be at least {least}")
    try:
        out.touch()  # now, and not after all windows
    except OSError as exc:
        raise ConfigError(f"--out: cannot write {str(out)!r}: {exc.strerror}") from exc
    found: list[dict[str, Any]] = []
    with reporting() as progress, Client(server, timeout_s=30) as client:
        info = client.model_info()
        shape = (info.num_moe_layers, info.num_experts)
        before = _sums(client, shape)
        for number in range(windows):
            progress(f"window {number + 1} of {windows}: {seconds:g} s")
            time.sleep(seconds)
            now = _sums(client, shape)
            found.append(_window(before, now, seconds))
            before = now
        sizes = list(client.loads().expert_bytes)
    content: dict[str, Any] = {"windows": found, "model": info.name, "fingerprint": info.fingerprint}
    if sizes:
        content["expert_bytes"] = sizes
    out.write_text(json.dumps(content) + "\n", encoding="utf-8")
    tokens = [sum(map(sum, window["loads"])) for window in found]
    if as_json:
        emit({"out": str(out), "windows": len(found), "seconds": seconds, "tokens": tokens})
    else:
        stdout.print(f"{len(found)} windows in {out}; tokens x experts: {', '.join(str(count) for count in tokens)}")


Sums = dict[str, list[list[int]]]


def _sums(client: Any, shape: tuple[int, int]) -> Sums:
    """By name, layer and expert; a server that nobody has asked yet tells no layers."""
    layers = client.loads().layers
    none = [[0] * shape[1] for _ in range(shape[0] - len(layers))]
    return {name: [list(getattr(layer, name)) for layer in layers] + none for name in _NAMES}


def _window(before: Sums, now: Sums, seconds: float) -> dict[str, Any]:
    if any(sum(map(sum, now[name])) < sum(map(sum, before[name])) for name in _NAMES):
        raise Unavailable("the server was started anew while its loads were recorded; record again")
    grown = {
        name: [
            [later - earlier for later, earlier in zip(after_E, before_E, strict=True)]
            for after_E, before_E in zip(now[name], before[name], strict=True)
        ]
        for name in _NAMES
    }
    loads = [
        [decode + prefill for decode, prefill in zip(decode_E, prefill_E, strict=True)]
        for decode_E, prefill_E in zip(grown["decode_tokens"], grown["prefill_tokens"], strict=True)
    ]
    return {"loads": loads, **grown, "seconds": seconds}
