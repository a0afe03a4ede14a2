"""What is known of GPUs, and how they are shared, on machines that have none."""

from __future__ import annotations

import ctypes
import sys
import types
from typing import Any

import pytest

from cluster.app import gpus_each
from cluster.config import Config
from cluster.engine.blocks import BlockPool
from cluster.engine.scheduler import Scheduler
from cluster.errors import ConfigError
from cluster.placement.shares import has_room
from cluster.plan import Plan
from cluster.settings import EngineConfig
from cluster.transport.gpus import path_between

ONE, OTHER = "0000:17:00", "0000:65:00"


class _NvmlError(Exception):
    """Stands for pynvml.NVMLError."""


def library(status: Any) -> types.ModuleType:
    """nvidia-ml-py as it is: one of its constants is a tuple, which its C function does not take."""
    module: Any = types.ModuleType("pynvml")
    module.NVML_P2P_CAPS_INDEX_READ = (0,)
    module.NVML_P2P_CAPS_INDEX_NVLINK = 2
    module.NVML_P2P_STATUS_OK = 0
    module.NVMLError = _NvmlError
    module.nvmlInit = module.nvmlShutdown = lambda: None
    module.nvmlDeviceGetHandleByPciBusId = lambda address: address
    module.nvmlDeviceGetP2PStatus = lambda _one, _other, index: status(index)
    return module


def use(monkeypatch: pytest.MonkeyPatch, status: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library(status))


@pytest.mark.parametrize(("works", "path"), [(2, "NVLink"), (0, "PCIe peer access"), (None, "host memory")])
def test_how_two_gpus_reach_each_other(monkeypatch: pytest.MonkeyPatch, works: int | None, path: str) -> None:
    def status(index: int) -> int:
        if not isinstance(index, int):
            raise ctypes.ArgumentError("argument 3: TypeError: Don't know how to convert parameter 3")
        return 0 if index == works else 1

    use(monkeypatch, status)
    assert path_between(ONE, OTHER) == path


@pytest.mark.parametrize("error", [_NvmlError("no such GPU"), ctypes.ArgumentError("odd"), AttributeError("older")])
def test_a_library_that_cannot_tell_keeps_no_link_from_being_made(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def status(_index: int) -> int:
        raise error

    use(monkeypatch, status)
    assert path_between(ONE, OTHER) == ""
    assert path_between(ONE, ONE) == ""


def booked(monkeypatch: pytest.MonkeyPatch, gpus: int, **settings: Any) -> float:
    config = Config(**settings)
    monkeypatch.setattr("cluster.app.ray.cluster_resources", lambda: {"GPU": float(gpus)} if gpus else {})
    return gpus_each(Plan(config, (8,), tuple(((0,),) for _ in range(max(1, config.groups))), ()))


def test_each_process_books_its_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert booked(monkeypatch, 0, groups=2) == 0.0
    assert booked(monkeypatch, 3, groups=2, device="cpu") == 0.0
    assert booked(monkeypatch, 3, groups=2) == 1.0
    assert booked(monkeypatch, 1, groups=0) == 1.0
    assert booked(monkeypatch, 1, groups=2, gpu_share=0.33) == 0.33
    assert booked(monkeypatch, 2, groups=3, routers=1, gpu_share=0.5) == 0.5


@pytest.mark.parametrize(
    ("gpus", "settings", "words"),
    [
        (1, {"groups": 2}, ["3 GPUs are needed (one for each", "has 1", "--groups 0", "gpu_share 0.3333"]),
        (1, {"groups": 2, "gpu_share": 0.4}, ["2 GPUs are needed (0.4 of one", "--groups 1", "gpu_share 0.3333"]),
        # Two processes on each: no process has halves of two.
        (2, {"groups": 4, "gpu_share": 0.4}, ["3 GPUs are needed", "--groups 3", "gpu_share 0.3333"]),
    ],
)
def test_too_few_gpus_are_refused_with_what_would_do(
    monkeypatch: pytest.MonkeyPatch, gpus: int, settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        booked(monkeypatch, gpus, **settings)
    for word in words:
        assert word in str(caught.value)
    share = float(str(caught.value).split("gpu_share ")[1].split()[0])
    assert booked(monkeypatch, gpus, **{**settings, "gpu_share": share}) == share


@pytest.mark.parametrize(
    ("gpus", "free", "share", "fits"),
    [
        (2, 1.0, 1.0, True),
        (2, 0.0, 1.0, False),
        (1, 0.25, 0.25, True),
        (1, 0.0, 0.25, False),
        # 0.2 free on each of two: together enough, for nobody.
        (2, 0.4, 0.4, False),
        (2, 0.8, 0.4, True),
        # Ray books 0.1429, of which six fit.
        (1, 1 - 6 * 0.1429, 0.142857, False),
        (0, 0.0, 0.0, True),
    ],
)
def test_free_parts_of_several_gpus_are_not_one(gpus: int, free: float, share: float, fits: bool) -> None:
    assert has_room(gpus, free, share) == fits


def test_steps_are_larger_on_a_gpu_unless_somebody_says_how_large() -> None:
    large, small = EngineConfig().sized(on_gpu=True), EngineConfig().sized(on_gpu=False)
    assert large.step_token_budget > small.step_token_budget > 0
    assert EngineConfig(step_token_budget=7, prefill_chunk=3).sized(on_gpu=True).prefill_chunk == 3
    with pytest.raises(ConfigError, match="step_token_budget"):
        Scheduler(EngineConfig(), BlockPool(1, 1), lambda: 0.0)


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_part_of_one(share: float) -> None:
    with pytest.raises(ConfigError, match="gpu_share"):
        Config(gpu_share=share)
