"""Hosts made of Linux namespaces, each with its own network, processes, files and sshd, and a laptop to call them from.

Each host has a root of its own (an overlay whose changes are in memory), so what is left behind in one is in no other,
and killing its first process is pulling its plug. None of them reaches the outside: the only network is a bridge inside
the laptop's namespace.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NETWORK, LAPTOP = "10.77.0", "10.77.0.1"
FIRST = 11
BRIDGE = "em0"
TOOLS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "rsync", "mount", "chroot")
START_S = 20.0

# Runs as the first process of a host, before it becomes sshd. $1 scratch, $2 name, then what is mounted as it is.
BOOT = r"""
set -e
scratch=$1; name=$2; shift 2
mount --make-rprivate /
mount -t tmpfs -o size=4g tmpfs "$scratch"
mkdir -p "$scratch/up" "$scratch/work" "$scratch/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/up,workdir=$scratch/work" "$scratch/root"
root=$scratch/root
mount --rbind /dev "$root/dev"
mkdir -p "$root/proc" "$root/sys" "$root/tmp" "$root/run" "$root/root" "$root/srv/expertmesh/model"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount --bind "$root/dev/pts/ptmx" "$root/dev/ptmx"
mount -t tmpfs -o size=2g tmpfs "$root/dev/shm"
for place in tmp run root; do mount -t tmpfs -o mode=1777 tmpfs "$root/$place"; done
chmod 700 "$root/root"; chmod 755 "$root/run"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
for place in "$@"; do mkdir -p "$root$place"; mount --rbind "$place" "$root$place"; done
mount --bind "$EM_MODEL" "$root/srv/expertmesh/model"
hostname "$name"
{ echo "127.0.0.1 localhost"; echo "$EM_HOSTS" | tr ',' '\n'; } > "$root/etc/hosts"
mkdir -p "$root/root/.ssh" "$root/run/sshd"; chmod 700 "$root/root/.ssh"
cp "$EM_KEYS/key.pub" "$root/root/.ssh/authorized_keys"
cp "$EM_KEYS/host" "$root/run/host_key"; chmod 600 "$root/run/host_key"
echo "export PATH=$EM_BIN:\$PATH" > "$root/root/.bashrc"
echo '. ~/.bashrc' > "$root/root/.bash_profile"
exec chroot "$root" /usr/sbin/sshd -D -e -f /dev/null -h /run/host_key -o UsePAM=no -o PasswordAuthentication=no \
    -o StrictModes=no -o MaxSessions=64 -o MaxStartups=64 -o PidFile=none -o PermitRootLogin=prohibit-password
"""


def missing() -> str:
    """Why hosts cannot be made here; empty if they can."""
    if os.geteuid() != 0:
        return "only root can make namespaces"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [tool for tool in TOOLS if shutil.which(tool, path=path) is None]
    if lacking:
        return f"{', '.join(lacking)} missing (Debian: openssh-server openssh-client rsync iproute2 util-linux)"
    probe = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False)
    return "" if probe.returncode == 0 else f"namespaces are not allowed here: {probe.stderr.decode().strip()}"


def _run(*command: str, timeout_s: float = 30.0) -> None:
    subprocess.run(command, check=True, timeout=timeout_s, capture_output=True)


class Host:
    """One of them. ``name`` is its host name."""

    def __init__(self, name: str, address: str, process: subprocess.Popen[bytes]) -> None:
        self.name, self.address, self._process = name, address, process

    def processes(self) -> list[psutil.Process]:
        """All that run on it, its first one included, as this machine sees them."""
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def power_off(self) -> None:
        """As if its plug were pulled: its first process is killed, and with it all others."""
        first = psutil.Process(self._process.pid).children()
        for process in first:
            process.send_signal(signal.SIGKILL)
        self._process.wait(20)


class Hosts:
    """Some hosts and a laptop. Use as a context manager; everything is gone afterwards."""

    def __init__(self, count: int, model: Path) -> None:
        self._id = uuid.uuid4().hex[:6]
        self._lap = f"em{self._id}l"
        self._spaces: list[str] = []
        self._stack = contextlib.ExitStack()
        self._model = model
        self.scratch = Path(tempfile.mkdtemp(prefix="em-hosts-", dir="/var/tmp"))
        self.home, self.tmp = self.scratch / "home", self.scratch / "tmp"
        self.names = ["head", *(f"worker-{number}" for number in range(1, count))]
        self.hosts: list[Host] = []

    def __enter__(self) -> Hosts:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for folder in (self.home / ".ssh", self.tmp):
            folder.mkdir(parents=True)
        (self.home / ".ssh").chmod(0o700)
        key = self.home / ".ssh" / "id_ed25519"
        for path in (key, self.scratch / "host"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
        shutil.copy(f"{key}.pub", self.scratch / "key.pub")
        self._space(self._lap)
        _run("ip", "-n", self._lap, "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "-n", self._lap, "addr", "add", f"{LAPTOP}/24", "dev", BRIDGE)
        _run("ip", "-n", self._lap, "link", "set", BRIDGE, "up")
        for number, name in enumerate(self.names):
            self.hosts.append(self._host(number, name))
        limit = time.monotonic() + START_S
        for host in self.hosts:
            while self.ssh(host, "true", check=False).returncode != 0:
                if time.monotonic() > limit:
                    raise RuntimeError(f"{host.name} has no sshd: {(self.scratch / f'{host.name}.log').read_text()}")
                time.sleep(0.2)

    def _space(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._spaces.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _host(self, number: int, name: str) -> Host:
        space, port = f"em{self._id}{number}", f"port{number}"
        address = f"{NETWORK}.{FIRST + number}"
        self._space(space)
        _run("ip", "-n", self._lap, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "-n", self._lap, "link", "set", port, "master", BRIDGE, "up")
        _run("ip", "-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")
        own = self.scratch / name
        own.mkdir()
        # What may lie outside the root file system: the project, its environment, and the interpreter below that.
        shared = sorted({str(ROOT), sys.prefix, sys.base_prefix})
        known = ",".join(f"{NETWORK}.{FIRST + n} {other}" for n, other in enumerate(self.names))
        environ = {
            "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin",
            "EM_KEYS": str(self.scratch),
            "EM_MODEL": str(self._model),
            "EM_HOSTS": known,
            "EM_BIN": str(Path(sys.executable).parent),
        }
        with (self.scratch / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{space}", "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork"]
                + ["--kill-child", "/bin/sh", "-c", BOOT, "boot", str(own), name, *shared],
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Host(name, address, process)

    def command(self, *command: str) -> list[str]:
        """What runs a command on the laptop: in its network, with its home (ssh does not go by $HOME) and its /tmp/ray,
        where the launcher keeps what it knows of clusters."""
        user_home = Path(pwd.getpwuid(os.geteuid()).pw_dir)
        mounts = ["mkdir -p /tmp/ray", f"mount --bind {shlex.quote(str(self.tmp))} /tmp/ray"]
        for path in {Path(sys.base_prefix), Path(sys.prefix), ROOT}:
            if path.is_relative_to(user_home):  # an interpreter in the home that is about to be covered
                inside_home = self.home / path.relative_to(user_home)
                inside_home.mkdir(parents=True, exist_ok=True)
                mounts.append(f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(inside_home))}")
        mounts.append(f"mount --rbind {shlex.quote(str(self.home))} {shlex.quote(str(user_home))}")
        script = f"{' && '.join(mounts)} && exec {shlex.join(command)}"
        inside = ["unshare", "--mount", "--propagation", "private", "/bin/sh", "-c", script]
        return ["nsenter", f"--net=/run/netns/{self._lap}", *inside]

    def environ(self, **more: str) -> dict[str, str]:
        """Of the laptop."""
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "EXPERTMESH_"))}
        return {**kept, "HOME": pwd.getpwuid(os.geteuid()).pw_dir, "PATH": path, "PYTHONPATH": str(ROOT), **more}

    def run(
        self, *command: str, timeout_s: float = 120.0, check: bool = True, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command on the laptop, to its end."""
        return subprocess.run(
            self.command(*command),
            env=self.environ(**more),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=check,
        )

    def ssh(
        self, host: Host, command: str, timeout_s: float = 120.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, in a login shell as Ray uses it."""
        options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5")
        flags = [part for option in options for part in ("-o", option)]
        key = f"{pwd.getpwuid(os.geteuid()).pw_dir}/.ssh/id_ed25519"
        line = f"bash --login -c {shlex.quote(command)}"
        return self.run("ssh", "-i", key, *flags, f"root@{host.address}", line, timeout_s=timeout_s, check=check)

    def __exit__(self, *_exc: object) -> None:
        left = [process for host in self.hosts for process in host.processes()]
        for host in self.hosts:
            with contextlib.suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
                host.power_off()
        psutil.wait_procs(left, timeout=20)
        for space in reversed(self._spaces):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        shutil.rmtree(self.scratch, ignore_errors=True)
