"""What a metered program says of itself: `pipeline.phase("backward")`,
`pipeline.count(tokens=...)`.

Under `python -m pipeline meter` each process that says something is a *rank*: it keeps one small
file in the run's folder, which a thread of its own rewrites every few seconds and which holds its
life (monotonic start and end), the self time of every phase, and its counts. A killed process loses
at most `FLUSH_S`. Elsewhere both do nothing.

Phases belong to the main thread. A forked process, or a data loader's worker, is part of the rank
it works for: it neither writes nor counts as a rank.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from numbers import Real
from pathlib import Path
from typing import Any

from pipeline.ledger.devices.table import KINDS
from pipeline.ledger.metrics import PHASES
from pipeline.ledger.phases import PhaseClock

ENV = "PIPELINE_METER"
"""Names the folder of the run that meters this process."""
RANKS = "ranks"  # in that folder, one file per rank
FLUSH_S = 2.0
_NAMES = frozenset(PHASES)
_NOTHING: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """Book what happens inside to a phase of the metered program; does nothing where nothing is
    metered.

    Args:
        name: One of `pipeline.ledger.metrics.PHASES`: data_wait, h2d, forward, backward, optimizer,
            eval, ...

    Raises:
        ValueError: If it is none of them, metered or not.
    """
    if name not in _NAMES:
        raise ValueError(f"phase {name!r} is not one of {', '.join(PHASES)}")
    reporter = _current()
    return _NOTHING if reporter is None else reporter.phase(name)


def count(*, tokens: float = 0, examples: float = 0, steps: float = 0, flops: float = 0) -> None:
    """Add to what this process has done. Every rank counts its own share.

    Args:
        tokens: Trained on, padding excluded.
        examples: Trained on.
        steps: Optimizer steps; all ranks take the same ones, and the most of any is the run's.
        flops: That the method needed, without recomputation.

    Raises:
        ValueError: If a number is negative or not finite.
        TypeError: If it is not a number (a tensor would have to be waited for).
    """
    given = {"tokens": tokens, "examples": examples, "steps": steps, "flops": flops}
    for name, value in given.items():
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a plain number, not {type(value).__name__}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} is negative or not finite")
    reporter = _current()
    if reporter is not None:
        reporter.count({name: value for name, value in given.items() if value})


class Reporter:
    """Keeps one rank's file up to date.

    Args:
        folder: Of the metered run.
        now_ns: Monotonic clock; injectable.
    """

    def __init__(self, folder: Path, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._lock = threading.RLock()  # a signal's handler may mark a phase inside one
        # Apart from `_lock`, so that a slow disk does not hold up the phases of the program.
        self._writing = threading.Lock()
        self._clock = PhaseClock(now_ns)
        self._pid = os.getpid()
        self._counts: dict[str, int | float] = {}
        self._device: tuple[str, str] | None = None
        self._warned = False
        self._start_ns = self._read()[1]
        host = "".join(c if c.isalnum() or c in "-." else "_" for c in os.uname().nodename)
        # The start in the name keeps processes apart that were given the same pid one after the
        # other.
        self._file = folder / RANKS / f"{host}-{self._pid}-{self._start_ns}.json"
        self._done = threading.Event()
        self._fixed = {
            "schema": 1,
            "host": os.uname().nodename,
            "pid": self._pid,
            "rank": _integer("RANK"),
            "world_size": _integer("WORLD_SIZE"),
            "local_rank": _integer("LOCAL_RANK"),
            "start_ns": self._start_ns,
        }

    def start(self) -> None:
        """Write the file for the first time and keep it up to date until the process ends."""
        self.flush()
        threading.Thread(target=self._keep_flushing, name="pipeline-meter", daemon=True).start()
        atexit.register(self.close)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return the context that books to `name`; nothing in a thread that is not the main one."""
        if threading.current_thread() is not threading.main_thread():
            self._warn(
                "phases of other threads than the main one are not counted: they overlap with it"
            )
            return _NOTHING
        if self._device is None:
            self._device = _opened_device()
        return _Phase(self._clock.phase(name), self._lock)

    def count(self, given: dict[str, int | float]) -> None:
        """Add to the counts; any thread may."""
        with self._lock:
            for name, value in given.items():
                # numpy's numbers are not JSON's
                plain = int(value) if value == int(value) else float(value)
                self._counts[name] = self._counts.get(name, 0) + plain

    def flush(self, *, ended: bool = False) -> None:
        """Replace the file by what is known now. A folder that is gone or full ends no training."""
        temporary = self._file.with_suffix(".new")
        with self._writing:
            if self._done.is_set() and not ended:
                return  # the last word has been written
            with self._lock:
                end_ns, _, phases_ns = self._read()
                content = {
                    **self._fixed,
                    "end_ns": end_ns,
                    "ended": ended,
                    "device": self._device and self._device[0],
                    "device_name": self._device and self._device[1],
                    "phases_ns": phases_ns,
                    "counts": dict(self._counts),
                }
            try:
                temporary.write_text(json.dumps(content), encoding="utf-8")
                # A reader sees the old file or the new one, never half of one.
                temporary.replace(self._file)
            except OSError as error:
                self._warn(f"phases cannot be written to {self._file} ({error.strerror})")

    def close(self) -> None:
        """Write the last state; a forked process leaves its parent's file alone."""
        if os.getpid() == self._pid:
            # Before the last flush: the thread writes nothing after it.
            self._done.set()
            self.flush(ended=True)

    def _read(self) -> tuple[int, int, dict[str, int]]:
        """Return time now, the time the clock began, and the self times, which sum to their
        difference exactly.
        """
        now_ns, phases_ns = self._clock.mark()
        # Self times add up to the wall time, so the beginning follows from them.
        return now_ns, now_ns - sum(phases_ns.values()), phases_ns

    def _keep_flushing(self) -> None:
        while not self._done.wait(FLUSH_S):
            self.flush()

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            # nothing here may end the program, warnings turned into errors neither
            with suppress(OSError):
                os.write(2, f"warning: pipeline meter: {text}\n".encode())


class _Phase(AbstractContextManager[None]):
    """A phase of the clock whose edges do not meet a flush half-way."""

    __slots__ = ("_lock", "_opened")

    def __init__(self, opened: AbstractContextManager[None], lock: Any) -> None:
        self._opened, self._lock = opened, lock

    def __enter__(self) -> None:
        with self._lock:
            self._opened.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._opened.__exit__(None, None, None)


# -- this process ---------------------------------------------------------------------------------

_UNKNOWN: Any = object()
_reporter: Any = _UNKNOWN  # until first asked for


def _current() -> Reporter | None:
    """Return this process's reporter; None where nothing is metered, or where it works for a
    rank.
    """
    global _reporter
    if _reporter is _UNKNOWN:
        folder = os.environ.get(ENV)
        _reporter = Reporter(Path(folder)) if folder and not _is_worker() else None
        if _reporter is not None:
            _reporter.start()
    return _reporter


def _is_worker() -> bool:
    """Tell whether this is a worker that another process keeps: a data loader's are daemons of
    multiprocessing.
    """
    processes = sys.modules.get("multiprocessing.process")
    return processes is not None and bool(processes.current_process().daemon)


def nested_in() -> dict[str, str]:
    """Return the tag of a run that a meter's command started: the meter's run holds the same
    seconds.
    """
    folder = os.environ.get(ENV)
    return {"nested_in": Path(folder).name} if folder else {}


def _forget() -> None:
    """In a forked child of a rank: it is no rank itself. One whose parent was silent may become
    one.
    """
    global _reporter
    if _reporter is not _UNKNOWN:
        _reporter = None


os.register_at_fork(after_in_child=_forget)


def _integer(name: str) -> int | None:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def _opened_device() -> tuple[str, str] | None:
    """Return identity and name of the accelerator that this program has opened; imports nothing."""
    return next((found for kind in KINDS.values() if (found := kind.opened()) is not None), None)
