"""A process keeps one team of threads: whoever has loaded gives its own back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cluster.config import EMBEDDED_MODEL
from cluster.kernels.team import team

pytestmark = pytest.mark.skipif(team("tiles_compiled") is None, reason="nothing can be compiled here")

PROGRAM = """
import json, os, threading
import torch
from cluster.kernels.team import release_team

def threads():
    return len(os.listdir("/proc/self/task"))

def loop():
    return torch.ones(1000, 1000).exp().sum()

found = {}
def work():
    torch.set_num_threads(3)
    before = threads()
    loop()
    found["more"] = threads() - before
    release_team()
    found["left"] = threads() - before
    found["right"] = abs(float(loop()) - 1e6 * 2.718281828) < 10
    found["again"] = threads() - before
    release_team()
    release_team()
    found["none"] = threads() - before

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps(found))
"""

BUILDS = """
import json, os, sys
import torch
from cluster.bench.engine import QUIET, router_of
from cluster.config import load_config
from cluster.kernels.team import release_team

flags = {"model": sys.argv[1], "groups": 0, "threads": 2, "data_plane": {"secret": "x"}, "telemetry": QUIET}
with router_of(load_config(flags=flags, environ={})):
    now = len(os.listdir("/proc/self/task"))
    release_team()
    after = len(os.listdir("/proc/self/task"))
    torch.ones(1000, 1000).exp()
    used = len(os.listdir("/proc/self/task"))
print(json.dumps({"left": now - after, "then": used - after}))
"""


def run(program: str, *arguments: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=True
    )
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_team_that_is_given_back_ends_and_may_come_again() -> None:
    assert run(PROGRAM) == {"more": 2, "left": 0, "right": True, "again": 2, "none": 0}


def test_the_thread_that_has_built_a_router_has_no_team_left() -> None:
    assert run(BUILDS, str(EMBEDDED_MODEL)) == {"left": 0, "then": 1}
