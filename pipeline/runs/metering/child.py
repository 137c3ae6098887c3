"""A command run as if its shell had started it: same streams, signals passed on, the exit code a
shell would give.

Without a terminal the command leads a process group of its own, and signals go to all of it. On a
terminal it stays in ours, so that it can read what is typed and Ctrl-C and Ctrl-Z reach it from the
terminal itself; other signals go to it and to what it has started.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.errors import UserError
from pipeline.ledger.values import Value, measured, null

# POSIX shell command language, 2.8.2 and 2.9.1.1
NOT_EXECUTABLE, NOT_FOUND, BY_SIGNAL = 126, 127, 128
PASSED_ON = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
DYING_S = 0.5  # that killed processes may take to be gone
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
TYPED = (signal.SIGINT, signal.SIGQUIT)  # a terminal sends these to all that it talks to


class CannotStart(UserError):
    """A command that is not there or cannot be executed, with the exit code that shells give for
    it.
    """

    def __init__(self, command: str, problem: str, remedy: str, code: int) -> None:
        super().__init__(command, problem, remedy)
        self.code = code


def check_command(name: str) -> None:
    """Refuse what cannot be started, before anything is written.

    Raises:
        CannotStart: With exit code 127 if there is no such command, 126 if it is not executable.
    """
    if shutil.which(name) is not None:
        return
    if os.sep in name and Path(name).exists():
        raise CannotStart(
            name, "is not executable", "name its interpreter first: python, bash", NOT_EXECUTABLE
        )
    raise CannotStart(name, "is no command here", "check the name, or PATH", NOT_FOUND)


class Child:
    """The command's process.

    Args:
        kill_after_s: Seconds after the first signal that asks it to end until SIGKILL; None: it may
            take its time.

    Attributes:
        stopped_by: The first signal passed on that asks a program to end; None so far.
        end_ns: Monotonic time when its end was seen.
        host_peak: Most memory that any one of its processes held (one that nobody waited for is not
            seen), in bytes.
    """

    def __init__(
        self, command: Sequence[str], environ: Mapping[str, str], *, kill_after_s: float | None
    ) -> None:
        self._command, self._environ, self._kill_after_s = (
            list(command),
            dict(environ),
            kill_after_s,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._ended = threading.Event()
        self._own_group = not _on_terminal()
        self.stopped_by: int | None = None
        self.start_ns = self.end_ns = 0
        self.host_peak: Value = null("the command did not run")

    @property
    def pid(self) -> int:
        """Its process id, which is its group's, too, where it has one of its own."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it.

        Raises:
            CannotStart: If the system cannot after all (its interpreter is missing, its format
                unknown).
        """
        self.start_ns = time.monotonic_ns()
        try:
            self._process = subprocess.Popen(
                self._command, env=self._environ, process_group=0 if self._own_group else None
            )
        except OSError as error:
            code = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
            problem, remedy = (
                f"cannot be started ({error.strerror})",
                "check its first line and its format",
            )
            raise CannotStart(self._command[0], problem, remedy, code) from None
        finally:
            self.end_ns = time.monotonic_ns()
        # Signals that came before there was a process to pass them on to.
        for number in self._early:
            self._send(number)

    def wait(self) -> int:
        """Wait until it ends, however long; return its exit code, negative for the signal that
        ended it.
        """
        assert self._process is not None
        # `wait4`, not `wait`: it also gives the peak memory of the child.
        _, status, usage = os.wait4(self._process.pid, 0)
        self.end_ns = time.monotonic_ns()
        self._ended.set()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        own_kib = _own_peak_kib()
        if usage.ru_maxrss > own_kib:
            self.host_peak = measured(usage.ru_maxrss * 1024)
        else:  # the kernel's mark begins with what this process held when it started the command
            self.host_peak = null(
                f"its processes held no more than {own_kib} KiB, less than which is not seen"
            )
        return self._process.returncode

    @contextmanager
    def signals(self) -> Generator[None]:
        """Pass on signals that arrive meanwhile; what this process ignores (nohup), the command
        ignores, too.
        """
        wanted = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
        before = [signal.signal(number, self._pass_on) for number in wanted]
        try:
            yield
        finally:
            for number, handler in zip(wanted, before, strict=True):
                signal.signal(number, handler)

    def outlived(self) -> bool:
        """Tell whether processes of its group are still there after its end; those that are ending
        get a moment.
        """
        return (
            self._own_group
            and self._process is not None
            and not _gone_soon(lambda: _is_alive(self.pid))
        )

    def daemons(self, mark: str) -> list[str]:
        """Return what the command left behind in groups or sessions of its own (setsid), by name
        and number.

        Args:
            mark: `NAME=VALUE` in the command's environment, which whatever it starts inherits: a
                daemon has no parent left to be found by.
        """
        if self._process is None:
            return []
        found = lambda: [
            each for each in _marked(mark) if not self._own_group or _group_of(each.pid) != self.pid
        ]
        return [] if _gone_soon(lambda: bool(found())) else [_shown(each) for each in found()]

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if number in ENDING and self.stopped_by is None:
            self.stopped_by = number
            if self._kill_after_s is not None:
                threading.Thread(
                    target=self._kill_late, args=(self._kill_after_s,), daemon=True
                ).start()
        if self._process is None:
            self._early.append(number)
        elif not self._ended.is_set() and (self._own_group or number not in TYPED):
            self._send(number)  # on a terminal, Ctrl-C has reached it already

    def _kill_late(self, seconds: float) -> None:
        if not self._ended.wait(seconds):
            self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self._own_group:
                os.killpg(self.pid, number)
                return
            for pid in _descendants(self.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def exit_code(code: int) -> int:
    """Return what a shell says of a process: its exit code, or 128 and the signal that ended it."""
    return BY_SIGNAL - code if code < 0 else code


def _gone_soon(is_there: Callable[[], bool]) -> bool:
    """Tell whether something is gone within the moment that killed processes may take."""
    deadline = time.monotonic() + DYING_S
    while is_there():
        if time.monotonic() >= deadline:
            return False
        time.sleep(DYING_S / 10)
    return True


def _marked(mark: str) -> list[Any]:
    """Return the processes that run with `mark` in the environment they were started with, but for
    this one.
    """
    import psutil

    found: list[Any] = []
    for process in psutil.process_iter():
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if (
                mark.encode() in environ
                and process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except (OSError, psutil.Error):  # another user's, or gone
            continue
    return found


def _shown(process: Any) -> str:
    import psutil

    try:
        return f"{process.name()} ({process.pid})"
    except psutil.Error:
        return str(process.pid)


def _own_peak_kib() -> int:
    """Return the most memory this process has held since it began; what an exec replaced is not its
    own.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _is_alive(group: int) -> bool:
    """Tell whether a process group has members that run; the dead wait for a parent that may never
    ask.
    """
    import psutil

    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    statuses = (
        process.info["status"]
        for process in psutil.process_iter(["pid", "status"])
        if _group_of(process.info["pid"]) == group
    )
    return any(status != psutil.STATUS_ZOMBIE for status in statuses)


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _descendants(pid: int) -> list[int]:
    import psutil

    try:
        return [pid, *(each.pid for each in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _on_terminal() -> bool:
    """Tell whether we are what a terminal talks to."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
