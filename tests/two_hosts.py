"""Two hosts on one machine: network namespaces with a link between them that can be cut.

Needs root. Each host has a name, a loopback and an address of its own; files are the machine's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from ranks_here import rank_environment

PORT = 29871  # of a host of its own, where nobody else listens
LINK = "eth0"
SHELL = 'hostname "$0" && exec "$@"'
_number = count()


def why_not() -> str | None:
    """Return why there can be no namespaces here; None where there can."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed"
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made ({made.stderr.strip()})"
    _ip("netns", "del", name)
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class TwoHosts:
    """The two hosts `a` and `b`, and the ranks that were started on them."""

    name: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def host(self, rank: int, size: int) -> str:
        """Return the host of a rank: the first half of them are on `a`."""
        return f"{self.name}{'ab'[2 * rank // size]}"

    def start(
        self,
        command: Sequence[str],
        folders: Path | Sequence[Path],
        *,
        size: int = 2,
        only: Sequence[int] | None = None,
    ) -> list[subprocess.Popen[str]]:
        """Start the ranks of a command, which begins after `python`.

        Args:
            folders: In which each begins; one stands for all.
            only: Ranks that are started at all.
        """
        found: list[subprocess.Popen[str]] = []
        for rank in range(size) if only is None else only:
            environment = rank_environment(rank, size, PORT) | {
                "LOCAL_RANK": f"{rank % (size // 2)}",
                "LOCAL_WORLD_SIZE": f"{size // 2}",
                "MASTER_ADDR": "10.77.0.1",
                "GLOO_SOCKET_IFNAME": LINK,
            }
            host = self.host(rank, size)
            inside = ["ip", "netns", "exec", host, "unshare", "--uts", "sh", "-c", SHELL, host]
            process = subprocess.Popen(
                [*inside, sys.executable, *command],
                cwd=folders if isinstance(folders, Path) else folders[rank],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            found.append(process)
        self.started += found
        return found

    def cut(self) -> None:
        """Have nothing that a host sends reach the other: nobody is told."""
        _ip("link", "set", f"{self.name}0", "down")

    def mend(self) -> None:
        """Have it reach the other again."""
        _ip("link", "set", f"{self.name}0", "up")

    def make(self) -> None:
        """Make both hosts, and a bridge between their links."""
        _ip("link", "add", self.name, "type", "bridge")
        _ip("link", "set", self.name, "up")
        for number, letter in enumerate("ab"):
            host, end = f"{self.name}{letter}", f"{self.name}{number}"
            _ip("netns", "add", host)
            _ip("link", "add", end, "type", "veth", "peer", "name", LINK, "netns", host)
            _ip("link", "set", end, "master", self.name, "up")
            _ip("-n", host, "addr", "add", f"10.77.0.{number + 1}/24", "dev", LINK)
            for device in ("lo", LINK):
                _ip("-n", host, "link", "set", device, "up")

    def remove(self) -> None:
        """End what was started, and remove all."""
        for process in self.started:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate()
        for words in (*(("netns", "del", f"{self.name}{each}") for each in "ab"),):
            with suppress(subprocess.CalledProcessError):
                _ip(*words)
        with suppress(subprocess.CalledProcessError):
            _ip("link", "del", self.name)


@contextmanager
def two_hosts() -> Generator[TwoHosts]:
    """Give two hosts; end what runs on them, and remove them."""
    # the kernel lets go of a namespace's links after `ip` has returned
    hosts = TwoHosts(f"h{os.getpid() % 10**6}{next(_number)}")
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def ended(process: subprocess.Popen[str], within_s: float = 300) -> tuple[int, str, str]:
    """Return how a rank ended: exit code, output, errors."""
    output, errors = process.communicate(timeout=within_s)
    return process.returncode, output, errors


def until(seen: Path, pattern: str, process: subprocess.Popen[str], within_s: float = 240) -> None:
    """Wait until a file is there, for as long as a process lasts."""
    limit = time.monotonic() + within_s
    while not list(seen.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, f"no {pattern}"
        time.sleep(0.05)
