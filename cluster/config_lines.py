"""What is wrong with a configuration file: every problem, with its line. `cluster.config` stops at the first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Config, config_of
from cluster.errors import ConfigError

MAX_BYTES = 1024**2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``line`` counts from 1, 0 where it belongs to no line; ``key``, such as
    engine.max_running, is empty where it belongs to none."""

    line: int
    key: str
    message: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value that is no section, and where it is."""

    key: tuple[str, ...]
    value: Any
    line: int


def find_problems(path: Path) -> tuple[list[Problem], list[Config]]:
    """All problems in the order of their lines, and the configuration where there are none; of a file for
    `serve deploy` those of its applications."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return [Problem(0, "", f"has more than {MAX_BYTES} bytes")], []
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        return [Problem(0, "", f"cannot be read: {exc}")], []
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is None:
            return [], [Config()]
        if not isinstance(root, yaml.MappingNode):
            return [Problem(root.start_mark.line + 1, "", "must hold keys and values")], []
        problems: list[Problem] = []
        sections = _sections(root)
        found = [list(_entries(section, (), problems)) for section in sections]
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        return [Problem(mark.line + 1 if mark else 0, "", f"is not YAML: {exc.problem or exc.context}")], []
    except (yaml.YAMLError, RecursionError) as exc:
        return [Problem(0, "", f"is not YAML: {' '.join(str(exc).split())}")], []
    configs = [_check(entries, problems) for entries in found]
    problems.sort(key=lambda problem: problem.line)
    return problems, [] if problems else [config for config in configs if config is not None]


def _sections(root: yaml.MappingNode) -> list[yaml.MappingNode]:
    """The file itself, or of a file for `serve deploy` the ``config`` of each application, once where they share it."""
    applications = _under(root, "applications")
    if not isinstance(applications, yaml.SequenceNode):
        return [root]
    configs = [_under(_under(application, "args"), "config") for application in applications.value]
    return list({id(config): config for config in configs if isinstance(config, yaml.MappingNode)}.values())


def _under(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if getattr(name, "value", None) == key), None)


def _check(entries: list[_Entry], problems: list[Problem]) -> Config | None:
    """The configuration of one section, where nothing is wrong with it."""
    good: dict[str, Any] = {}
    for entry in entries:
        try:
            config_of(_nested(entry))
        except ConfigError as exc:
            if not _alone(entry, exc):
                _put(good, entry)  # wrong only without the others
                continue
            problems.append(Problem(entry.line, ".".join(entry.key), _without_source(exc)))
        else:
            _put(good, entry)
    try:
        return config_of(good)
    except ConfigError as exc:
        problems.append(_located(_without_source(exc), entries))
        return None


def locate(message: str, path: Path) -> Problem:
    """A problem that was found elsewhere, where its message begins with a key of the file."""
    root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
    sections = _sections(root) if isinstance(root, yaml.MappingNode) else []
    return _located(message, [entry for section in sections for entry in _entries(section, (), [])])


def _entries(node: yaml.MappingNode, prefix: tuple[str, ...], problems: list[Problem]) -> Iterator[_Entry]:
    loader = yaml.SafeLoader("")
    seen: dict[str, int] = {}
    _check_twice(node, prefix, problems)
    loader.flatten_mapping(node)  # merges what `<<` names
    for name_node, value_node in reversed(node.value):  # what is merged comes first, and holds least
        line = name_node.start_mark.line + 1
        name = str(getattr(name_node, "value", name_node))
        key = (*prefix, name)
        if name in seen:  # told already, or merged and then given anew
            continue
        seen[name] = line
        if isinstance(value_node, yaml.MappingNode) and len(prefix) < 8 and value_node.value:
            yield from _entries(value_node, key, problems)
        else:
            try:
                value = loader.construct_object(value_node, deep=True)
            except (ValueError, OverflowError) as exc:  # a date that there is not
                problems.append(Problem(line, ".".join(key), f"cannot be read: {exc}"))
                continue
            yield _Entry(key, value, line)


def _check_twice(node: yaml.MappingNode, prefix: tuple[str, ...], problems: list[Problem]) -> None:
    seen: dict[str, int] = {}
    for name_node, _ in node.value:
        name, line = str(getattr(name_node, "value", name_node)), name_node.start_mark.line + 1
        if name in seen:
            key = ".".join((*prefix, name))
            problems.append(Problem(line, key, f"is there twice; the first is in line {seen[name]}"))
        seen.setdefault(name, line)


def _nested(entry: _Entry) -> dict[str, Any]:
    value = entry.value
    for name in reversed(entry.key):
        value = {name: value}
    found: dict[str, Any] = value
    return found


def _put(tree: dict[str, Any], entry: _Entry) -> None:
    for name in entry.key[:-1]:
        tree = tree.setdefault(name, {})
    tree[entry.key[-1]] = entry.value


def _alone(entry: _Entry, error: ConfigError) -> bool:
    """The problem is this value, and not that another key is missing or different."""
    text = str(error)
    return "unknown key" in text or "must be of type" in text or "must be a section" in text or _own(entry, text)


def _own(entry: _Entry, text: str) -> bool:
    """A limit of the value itself: these checks name key and value, and nothing else of the configuration."""
    key = ".".join(entry.key)
    return re.match(rf"(?:[^:]*: )?{re.escape(key)}: got .*; must ", text) is not None


def _without_source(error: ConfigError) -> str:
    return re.sub(r"^(command line|configuration): ", "", str(error))


def _located(message: str, entries: list[_Entry]) -> Problem:
    begin = re.match(r"[a-z_]+(?:\.[a-z_]+)*", message)
    named = begin.group(0) if begin else ""
    for entry in entries:
        key = ".".join(entry.key)
        if key == named or key.startswith(f"{named}."):
            return Problem(entry.line, key, message)
    return Problem(0, named if message.startswith(f"{named}:") else "", message)
