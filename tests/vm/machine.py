"""A small virtual machine: a kernel, and an initial file system with this Python and a few files. Software emulation,
so it runs where no virtualisation is allowed."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

BOOT_TIMEOUT_S = 600
LEFT_OUT = {"test", "tests", "idlelib", "tkinter", "ensurepip", "turtledemo", "site-packages", "__pycache__", "lib2to3"}


def find_kernel() -> Path | None:
    """KERNEL, or the newest kernel image of the system."""
    named = os.environ.get("KERNEL")
    if named:
        return Path(named)
    found = sorted(Path("/boot").glob("vmlinuz-*"))
    return found[-1] if found else None


def find_emulator() -> str | None:
    """QEMU for x86-64."""
    return shutil.which("qemu-system-x86_64")


def libraries(binary: Path) -> set[Path]:
    """Shared libraries that a binary needs, its loader among them."""
    listed = subprocess.run(["ldd", str(binary)], capture_output=True, text=True, check=False).stdout
    words = (word for line in listed.splitlines() for word in line.split())
    return {Path(word) for word in words if word.startswith("/")}


def python_files() -> dict[str, Path]:
    """This Python: executable, standard library and what they link to, by their place in the guest."""
    executable = Path(sys.executable).resolve()
    stdlib = Path(sysconfig.get_path("stdlib")).resolve()
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    files = {"bin/python3": executable}
    for path in stdlib.rglob("*"):
        if path.is_file() and not LEFT_OUT & set(path.relative_to(stdlib).parts):
            files[f"python/lib/{version}/{path.relative_to(stdlib)}"] = path
    linked = libraries(executable)
    for module in ("_ctypes", "_json", "mmap", "_posixsubprocess", "math", "_struct"):
        for found in stdlib.glob(f"lib-dynload/{module}.*.so"):
            linked |= libraries(found)
    for library in linked:
        files[str(library).lstrip("/")] = library.resolve()
    return files


def cpio(files: dict[str, tuple[bytes, int]]) -> bytes:
    """A "newc" archive: what the kernel unpacks before it runs /init. Values are contents and mode."""
    parts: list[bytes] = []
    numbers = iter(range(1, 1 << 30))

    def add(name: str, data: bytes, mode: int) -> None:
        path = name.encode() + b"\0"
        fields = (next(numbers), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        parts.append(header + path + b"\0" * (-(len(header) + len(path)) % 4))
        parts.append(data + b"\0" * (-len(data) % 4))

    directories = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    for directory in sorted(directories):
        add(directory, b"", stat.S_IFDIR | 0o755)
    for name, (data, mode) in files.items():
        add(name, data, stat.S_IFREG | mode)
    add("TRAILER!!!", b"", 0)
    return b"".join(parts)


def run(kernel: Path, emulator: str, init: Path, extra: Iterable[tuple[str, Path]], folder: Path) -> str:
    """Boots a machine with two nodes of two CPUs and 512 MiB each; what it wrote to its console."""
    files = {name: (path.read_bytes(), 0o755) for name, path in {**python_files(), **dict(extra)}.items()}
    script = init.read_text().split("\n", 1)[1]
    files["init"] = (("#!/bin/python3\n" + script).encode(), 0o755)
    archive = folder / "initramfs.cpio"
    archive.write_bytes(cpio(files))
    command = [
        *(emulator, "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "1G", "-smp", "4", "-nographic", "-no-reboot"),
        *("-object", "memory-backend-ram,size=512M,id=m0", "-object", "memory-backend-ram,size=512M,id=m1"),
        *("-numa", "node,nodeid=0,cpus=0-1,memdev=m0", "-numa", "node,nodeid=1,cpus=2-3,memdev=m1"),
        *("-numa", "dist,src=0,dst=1,val=21", "-nic", "none"),
        *("-kernel", str(kernel), "-initrd", str(archive)),
        *("-append", "console=ttyS0 quiet panic=-1 PYTHONHOME=/python PYTHONDONTWRITEBYTECODE=1"),
    ]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BOOT_TIMEOUT_S,
        check=False,
    )
    return done.stdout + done.stderr
