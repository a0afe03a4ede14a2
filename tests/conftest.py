"""Fixtures of all tests: tiny checkpoints, made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from cluster.weights.zoo import make_model

transformers_logging.disable_progress_bar()

MakeTiny = Callable[..., Path]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How long each decoder is fuzzed; `make fuzz` asks for more than the short look of `make test`."""
    parser.addoption("--fuzz-seconds", type=float, default=1.0, help="Seconds for each target of tests/fuzz.")


@pytest.fixture(scope="session", autouse=True)
def _own_trace_store(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Commands that tests run leave their traces here, not in the user's store."""
    os.environ["EXPERTMESH_TELEMETRY__STORE"] = str(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """``tiny(arch, layout="per-expert", seed=1)``: path of a checkpoint without tokenizer."""
    root = tmp_path_factory.mktemp("zoo")

    def make(arch: str, layout: str = "per-expert", seed: int = 1) -> Path:
        path = root / f"{arch}-{layout}-{seed}"
        if not path.exists():
            make_model(arch, "tiny", seed, path, layout, progress=lambda _message: None)
        return path

    return make
