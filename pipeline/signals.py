"""What a scheduler sends before it takes a machine back, and how to listen for it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A run stops at its next step, with a checkpoint."""


class StoppedEarly(BaseException):
    """The machine is wanted back before there is a run that could stop."""


def stop_early(number: int, _: FrameType | None) -> None:
    """Handle a stop signal that comes while the program starts."""
    raise StoppedEarly(signal.Signals(number).name)


def listen_early() -> None:
    """Have stop signals end the program as preempted until a run listens for them itself."""
    for number in STOP_SIGNALS:
        signal.signal(number, stop_early)


def ignore_all() -> None:
    """Let no signal change an exit code that is decided: what is left is the interpreter's own tidying."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def is_listened_to(number: int) -> bool:
    """Tell whether somebody around this run, such as a multirun, listens for a stop signal."""
    handler = signal.getsignal(number)
    return callable(handler) and handler is not stop_early


@contextmanager
def on_stop_signal(handler: Callable[[int], None]) -> Generator[None]:
    """Call `handler` with the number of each stop signal while the body runs; afterwards all is as before."""

    def called(number: int, _: FrameType | None) -> None:
        handler(number)

    before = {number: signal.signal(number, called) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
