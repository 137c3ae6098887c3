"""Say what a process waits for, and for how long already, once it has waited two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from pipeline.store.locks import lock_at

AFTER_S = 2.0  # a shorter wait needs no word
EVERY_S = 10.0  # between two lines about the same wait


@contextmanager
def waiting_for(what: str, *, after_s: float = AFTER_S) -> Generator[None]:
    """Say on standard error, after `after_s` and then every `EVERY_S`, what the body waits for.

    Args:
        what: Continues "waiting for ...": who or what has to answer first.
        after_s: Seconds without a word.
    """
    done = threading.Event()
    started = time.monotonic()

    def say() -> None:
        pause = after_s
        while not done.wait(pause):
            waited = time.monotonic() - started
            print(f"waiting for {what} ({waited:.0f} s so far)", file=sys.stderr, flush=True)
            pause = EVERY_S

    thread = threading.Thread(target=say, daemon=True, name="waiting")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def locked(path: Path, what: str, *, timeout_s: float = -1) -> Generator[None]:
    """Hold the lock file at `path`; who has to wait for it reads `what` for.

    Args:
        timeout_s: Seconds to wait at most; negative: without end.

    Raises:
        filelock.Timeout: If another process held it all that time.
        UserError: If the storage there has no locks.
    """
    lock = lock_at(path)
    with waiting_for(what):
        lock.acquire(timeout=timeout_s)
    try:
        yield
    finally:
        lock.release()
