"""Checks of the machine that they run on. Each reads, none changes anything."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from cluster.doctor.findings import FAIL, OK, SKIP, WARN, Finding
from cluster.errors import ConfigError
from cluster.placement.numa import read_topology
from cluster.settings import SecurityConfig

DISTRIBUTION = "expertmesh"
LEAST_PYTHON = (3, 11)
LEAST_MEMORY_BYTES, LEAST_DISK_BYTES = 4 * 1024**3, 5 * 1024**3
RAY_FULL_SHARE = 0.95
"""Of the disk: from there on Ray refuses to spill and complains every ten seconds."""
SHM_SHARE = 0.25
"""Of memory: what Ray's object store wants to place in /dev/shm is 30 % at most, and takes less where there is less."""
CERTIFICATE_DAYS = 14
_TIME_ERROR = 5
_ADJTIMEX_BYTES = 512

Check = Callable[[], Iterator[Finding]]


def check_machine(security: SecurityConfig | None = None) -> list[Finding]:
    """All checks of this machine. A check that fails itself says so, and the others go on."""
    own = security or SecurityConfig()
    checks: list[tuple[str, Check]] = [
        ("python", _python),
        ("packages", _packages),
        ("cores", _cores),
        ("memory", _memory),
        ("shared_memory", _shared_memory),
        ("huge_pages", _huge_pages),
        ("numa", _numa),
        ("gpus", _gpus),
        ("nccl", _nccl),
        ("open_files", lambda: _open_files(own.max_connections)),
        ("disk", _disk),
        ("clock", _clock),
        ("certificates", lambda: _certificates(own)),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as exc:  # noqa: BLE001 (the machine is what is being examined)
            findings.append(Finding(name, SKIP, f"could not be checked: {type(exc).__name__}: {exc}"))
    return findings


def _python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    if sys.version_info < LEAST_PYTHON:
        yield Finding("python", FAIL, found, "use Python {}.{} or later".format(*LEAST_PYTHON))
    elif platform.system() != "Linux":
        yield Finding("python", FAIL, found, "serve on Linux: shared memory and binding need it")
    else:
        yield Finding("python", OK, found)


def _packages() -> Iterator[Finding]:
    """What is installed against what this project says it needs."""
    wrong, seen = [], []
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in ("ray", "torch", "transformers", "grpcio"):
            seen.append(f"{requirement.name} {version}")
    if wrong:
        yield Finding("packages", FAIL, "; ".join(wrong), "install the project again, with its constraints file")
    else:
        yield Finding("packages", OK, ", ".join(seen))


def _cores() -> Iterator[Finding]:
    usable, physical = len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False)
    found = f"{usable} usable of {os.cpu_count()} logical, {physical or '?'} physical"
    if usable < 2:
        yield Finding("cores", WARN, found, "router and groups take turns on one core; give it two at least")
    else:
        yield Finding("cores", OK, found)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} of {_gib(memory.total)} available"
    if memory.available < LEAST_MEMORY_BYTES:
        yield Finding("memory", WARN, found, f"Ray and a small model want {_gib(LEAST_MEMORY_BYTES)}")
    else:
        yield Finding("memory", OK, found)


def _shared_memory() -> Iterator[Finding]:
    usage = shutil.disk_usage("/dev/shm")
    found = f"/dev/shm has {_gib(usage.total)}, {_gib(usage.free)} free"
    if usage.free < SHM_SHARE * psutil.virtual_memory().total:
        remedy = "Ray takes slower files instead; in a container: --shm-size, or an emptyDir with medium Memory"
        yield Finding("shared_memory", WARN, found, remedy)
    else:
        yield Finding("shared_memory", OK, found)
    if not hasattr(os, "memfd_create"):
        yield Finding("shared_memory", FAIL, "no memfd_create", "links on one host will use gRPC; use a newer kernel")


def _huge_pages() -> Iterator[Finding]:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.exists():
        yield Finding("huge_pages", WARN, "the kernel has none", "weights are read up to 10 % slower")
        return
    chosen = path.read_text().partition("[")[2].partition("]")[0]
    if chosen == "never":
        yield Finding("huge_pages", WARN, "transparent huge pages: never", f"echo madvise > {path}")
    else:
        yield Finding("huge_pages", OK, f"transparent huge pages: {chosen}")


def _numa() -> Iterator[Finding]:
    topology = read_topology()
    count = len(topology.nodes)
    quota = "" if topology.quota_cpus is None else f"; a quota of {topology.quota_cpus:g} cores"
    found = f"{count} node{'s' if count != 1 else ''}, {len(topology.cores)} cores{quota}"
    if topology.quota_cpus is not None and topology.quota_cpus < 2:
        yield Finding("numa", WARN, found, "a quota below two cores makes every step wait for its turn: raise it")
    else:
        yield Finding("numa", OK, found)


def _gpus() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield Finding("gpus", OK, f"{len(names)}: {', '.join(sorted(set(names)))}; CUDA {torch.version.cuda}")
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        found = f"there is a driver, but torch {torch.__version__} finds no GPU"
        yield Finding("gpus", FAIL, found, "install the build of torch that matches the driver; see `nvidia-smi`")
    else:
        yield Finding("gpus", OK, "none: experts are computed on CPUs")


def _nccl() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("nccl", SKIP, "no GPU to use it with")
    elif not torch.distributed.is_nccl_available():
        yield Finding("nccl", WARN, "torch was built without it", "links between GPUs go by gRPC; use another build")
    else:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        if torch.cuda.device_count() > 1 and not torch.cuda.can_device_access_peer(0, 1):
            yield Finding(
                "nccl", WARN, f"{version}, but GPUs 0 and 1 do not reach each other", "see `nvidia-smi topo -m`"
            )
        else:
            yield Finding("nccl", OK, version)


def _open_files(max_connections: int) -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want, found = max_connections + 1024, f"{soft} (at most {hard})"
    if soft < want:
        remedy = f"ulimit -n {want}, or lower security.max_connections: connections beyond are not accepted"
        yield Finding("open_files", WARN, found, remedy)
    else:
        yield Finding("open_files", OK, found)


def _disk() -> Iterator[Finding]:
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    found = f"{folder} has {_gib(usage.free)} of {_gib(usage.total)} free"
    if usage.free < LEAST_DISK_BYTES or usage.used > RAY_FULL_SHARE * usage.total:
        yield Finding("disk", WARN, found, "Ray keeps logs there and stops working when it is full; set RAY_TMPDIR")
    else:
        yield Finding("disk", OK, found)


def _clock() -> Iterator[Finding]:
    """The kernel says whether somebody keeps its clock right (adjtimex with nothing to change)."""
    state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(_ADJTIMEX_BYTES))
    if state < 0:
        yield Finding("clock", SKIP, os.strerror(ctypes.get_errno()))
    elif state == _TIME_ERROR:
        remedy = "run chrony or systemd-timesyncd: spans of several hosts, and tokens that expire, go by the clock"
        yield Finding("clock", WARN, "nobody keeps it synchronised", remedy)
    else:
        yield Finding("clock", OK, "synchronised")


def _certificates(security: SecurityConfig) -> Iterator[Finding]:
    if not security.tls:
        yield Finding("certificates", SKIP, "TLS is off")
        return
    from cryptography import x509

    from cluster.transport.credentials import check_files

    try:
        check_files(security)
    except ConfigError as exc:
        yield Finding("certificates", FAIL, str(exc), "they must be PEM, fit together, and be there on every host")
        return
    for name in ("cert", "ca", "client_ca"):
        path = getattr(security, name)
        if not path:
            continue
        ends = min(made.not_valid_after_utc for made in x509.load_pem_x509_certificates(Path(path).read_bytes()))
        left = ends - datetime.datetime.now(datetime.UTC)
        found = f"{path} ends on {ends:%Y-%m-%d}"
        if left.total_seconds() <= 0:
            yield Finding("certificates", FAIL, found, "issue a new one; it is taken without a restart")
        elif left < datetime.timedelta(days=CERTIFICATE_DAYS):
            yield Finding("certificates", WARN, found, "renew it soon; it is taken without a restart")
        else:
            yield Finding("certificates", OK, found)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB"
