"""`expertmesh config`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.common import Json, emit, stdout


def check(
    file: Annotated[Path, typer.Argument(help="YAML file, as `serve --config` takes it.")],
    files: Annotated[
        bool, typer.Option("--files/--no-files", help="Open what it names too: model, plan, certificates, tokens.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Say all that is wrong with a configuration file, with line and key. Starts nothing."""
    from cluster.config_lines import find_problems, locate
    from cluster.errors import ExpertMeshError
    from cluster.plan import make_plan

    problems, configs = find_problems(file)
    for config in configs if files else []:
        try:
            make_plan(config)
        except ExpertMeshError as exc:
            found = locate(str(exc), file)
            problems.append(found if found.line else dataclasses.replace(found, key=found.key or "model"))
    if as_json:
        emit({"file": str(file), "ok": not problems, "problems": [dataclasses.asdict(problem) for problem in problems]})
    else:
        for problem in problems:
            stdout.print(_line(file, problem), markup=False)
        if not problems:
            stdout.print(f"[green]ok[/green]: {file}")
    if problems:
        raise typer.Exit(1)


def _line(file: Path, problem: object) -> str:
    line, key, message = dataclasses.astuple(problem)  # type: ignore[call-overload]
    where = f"{file}:{line}" if line else str(file)
    return f"{where}: {message}" if not key or message.startswith(key) else f"{where}: {key}: {message}"
