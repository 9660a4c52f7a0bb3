"""Hosts on this machine: network namespaces joined by a bridge, an sshd and a host name in each.

    python tests/cluster/hosts.py up 3        opens hosts a, b and c, says how to get there, and leaves them up
    python tests/cluster/hosts.py down        removes them

A host has its own network (a veth pair to the bridge), host name, processes, /run and ssh set-up; the file system is everybody's, as a
cluster's shared disk is. Needs root, network namespaces, and the Debian packages of PROGRAMS.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROGRAMS = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
PREFIX = "kds"  # of all names; a network device's may have 15 characters
_SERIAL = itertools.count()
SSHD = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin prohibit-password
MaxStartups 100
"""
SSH = """Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
UNSHARE = ("unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc")
# What runs in a host's fresh namespaces. The mounts are seen by this host alone.
INIT = """set -e
hostname {name}
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
exec {sshd} -D -e -f {folder}/sshd_config
"""


def missing() -> str:
    """Why hosts cannot be made here, or "" if they can."""
    if os.geteuid() != 0:
        return "hosts need root"
    for program, package in PROGRAMS.items():
        if shutil.which(program, path=search_path()) is None:
            return f"{program} is not installed (Debian package {package})"
    tag = f"{os.getpid()}x{next(_SERIAL)}"
    name = f"{PREFIX}-{tag}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, env=environment())
    if made.returncode == 0:
        made = subprocess.run(
            ["ip", "netns", "exec", name, *UNSHARE, "true"],
            capture_output=True, text=True, env=environment(),
        )  # fmt: skip
        remove(tag)
    return "" if made.returncode == 0 else f"namespaces cannot be made here ({made.stderr.strip()})"


@dataclass
class Hosts:
    """`names` become hosts with addresses 10.77.0.1, .2, ...; `tag`, by which they are removed, tells them from others."""

    names: Sequence[str]
    tag: str = field(default_factory=lambda: f"{os.getpid()}x{next(_SERIAL)}")
    folder: Path = field(init=False)
    _inits: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = Path(tempfile.gettempdir()) / f"{PREFIX}-{self.tag}"

    def __enter__(self) -> Hosts:
        remove_abandoned()
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        self.folder.mkdir(mode=0o700)
        for key in ("key", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / key], check=True)
        lines = [f"{self.address(name)} {name}" for name in self.names]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "\n".join(lines) + "\n")
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder))
        (self.folder / "ssh_config").write_text(SSH.format(folder=self.folder))
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for name in self.names:
            self._add(name)
        for name in self.names:
            self._wait_for_sshd(name)
        (self.folder / "inits.json").write_text(json.dumps(self._inits))

    def close(self) -> None:
        """Kills what runs on the hosts and removes them. May be called at any time, and again."""
        remove(self.tag)

    def address(self, name: str) -> str:
        return f"10.77.0.{1 + list(self.names).index(name)}"

    def start(
        self, name: str, command: Sequence[object], log: Path | None = None, **variables: str
    ) -> subprocess.Popen[str]:
        """A command in a shell of that host, in this process's working directory; output to `log`."""
        output: Any = subprocess.PIPE if log is None else log.open("w")
        return subprocess.Popen(
            [*self.enter(name), "env", "-C", os.getcwd(), *map(str, command)], env=environment() | variables, text=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def unplug(self, name: str) -> None:
        """Its packets go nowhere from now on, without an error on either side."""
        _ip("link", "set", self._device(name), "down")

    def plug_in(self, name: str) -> None:
        _ip("link", "set", self._device(name), "up")

    def processes(self, name: str) -> list[str]:
        """Command lines of what runs there, but for sshd and what came with a session of it."""
        return list(self._running(name).values())

    def kill(self, name: str) -> None:
        """All of these."""
        self.signal(name, signal.SIGKILL)

    def signal(self, name: str, number: int, command: str = "") -> None:
        """To those of these whose command line has `command`."""
        for pid, words in self._running(name).items():
            if command in words:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _running(self, name: str) -> dict[int, str]:
        found = {}
        for pid in _ip("netns", "pids", self._namespace(name)).split():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
                if "sshd" not in words[0] and Path(words[0]).name != "unshare" and any(words):
                    found[int(pid)] = " ".join(words).strip()
        return found

    def _add(self, name: str) -> None:
        namespace, device = self._namespace(name), self._device(name)
        _ip("netns", "add", namespace)
        _ip("link", "add", device, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", device, "master", self._bridge, "up")
        _ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            _ip("-n", namespace, "link", "set", link, "up")
        init = INIT.format(name=name, folder=self.folder, sshd=shutil.which("sshd", path=search_path()))
        with (self.folder / f"sshd-{name}.log").open("w") as log:
            outer = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *UNSHARE, "--kill-child", "sh", "-c", init],
                env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        until(lambda: _child(outer.pid) or outer.poll() is not None, f"{name} does not start")
        self._inits[name] = _child(outer.pid)

    def _wait_for_sshd(self, name: str) -> None:
        log = self.folder / f"sshd-{name}.log"
        until(lambda: "listening" in log.read_text(), f"sshd of {name} does not listen: see {log}")

    def enter(self, name: str) -> list[str]:
        return ["nsenter", "-t", str(self._inits[name]), "-m", "-u", "-n", "-p", "--"]

    def _namespace(self, name: str) -> str:
        return f"{PREFIX}-{self.tag}-{name}"

    def _device(self, name: str) -> str:
        return f"{PREFIX}{self.tag}{name}"

    @property
    def _bridge(self) -> str:
        return f"{PREFIX}{self.tag}"


def remove(tag: str) -> None:
    """All that a Hosts of this tag has made, however far it came."""
    for namespace in _namespaces():
        if namespace.startswith(f"{PREFIX}-{tag}-"):
            for pid in _ip("netns", "pids", namespace).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            until(lambda namespace=namespace: not _ip("netns", "pids", namespace).split(), f"{namespace} lives on")
            _ip("netns", "del", namespace)  # and with it the veth pair
    if Path(f"/sys/class/net/{PREFIX}{tag}").exists():
        _ip("link", "del", f"{PREFIX}{tag}")
    shutil.rmtree(Path(tempfile.gettempdir()) / f"{PREFIX}-{tag}", ignore_errors=True)


def remove_abandoned() -> None:
    """What test processes have left behind that are no more, whichever of namespaces, bridge and folder they had come to."""
    names = [*_namespaces(), *os.listdir("/sys/class/net"), *os.listdir(tempfile.gettempdir())]
    found = {each.groups() for name in names if (each := re.match(rf"{PREFIX}-?((\d+)x\d+)", name))}
    for tag, process in found:
        if not Path(f"/proc/{process}").exists():
            remove(tag)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _ip("netns", "list").splitlines() if line]


def _child(pid: int) -> int:
    """The first process in the namespaces that `unshare --fork` has made; 0 if there is none yet."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else 0
    return 0


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"
    return done.stdout


def environment() -> dict[str, str]:
    return os.environ | {"PATH": search_path()}


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"


def until(condition: Callable[[], object], otherwise: str | Callable[[], str], seconds: float = 30.0) -> None:
    """Waits for the condition; AssertionError with `otherwise` if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.05)


def main() -> None:
    match sys.argv[1:]:
        case ["up", count] if count.isdigit() and 0 < int(count) < 27:
            if reason := missing():
                sys.exit(f"error: {reason}")
            remove("hand")
            hosts = Hosts("abcdefghijklmnopqrstuvwxyz"[: int(count)], tag="hand")
            hosts.open()
            for name in hosts.names:
                print(f"{name}  {hosts.address(name)}  {' '.join(hosts.enter(name))} env -C {os.getcwd()} bash")
        case ["down"]:
            remove("hand")
        case _:
            sys.exit(f"{__doc__}")


if __name__ == "__main__":
    main()
