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


_noted: list[int] = []  # stop signals that came while the program started


def stop_early(number: int, _: FrameType | None) -> None:
    """Handle a stop signal that comes while the program starts."""
    _noted.append(number)
    # A BaseException, so that no `except Exception` of a library swallows it.
    raise StoppedEarly(signal.Signals(number).name)


def _interrupt(number: int, _: FrameType | None) -> None:
    _noted.append(number)
    raise KeyboardInterrupt


def listen_early() -> None:
    """Have stop signals end the program as preempted until a run listens for them itself; Ctrl-C is
    noted too.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, stop_early)
    # a shell's background job ignores it
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def noted() -> int | None:
    """Return the stop signal that has come, whatever became of what it raised; None where none
    has.
    """
    return _noted[0] if _noted else None


@contextmanager
def as_the_stop() -> Generator[None]:
    """Have whatever ends the body after a stop signal be that stop.

    A library that is interrupted while it is imported may raise something of its own: numpy an
    ImportError ("initialization failed").

    Raises:
        StoppedEarly, KeyboardInterrupt: In place of any exception that comes after the signal.
    """
    try:
        yield
    except Exception as error:
        heed(error)
        raise


def heed(error: Exception) -> None:
    """Raise the stop that has come, if any, in place of an exception."""
    number = noted()
    if number is not None:
        raise (
            KeyboardInterrupt()
            if number == signal.SIGINT
            else StoppedEarly(signal.Signals(number).name)
        ) from error


def ignore_all() -> None:
    """Let no signal change an exit code that is decided: what is left is the interpreter's own
    tidying.
    """
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def is_listened_to(number: int) -> bool:
    """Tell whether somebody around this run, such as a multirun, listens for a stop signal."""
    handler = signal.getsignal(number)
    return callable(handler) and handler is not stop_early


@contextmanager
def on_stop_signal(handler: Callable[[int], None]) -> Generator[None]:
    """Call `handler` with the number of each stop signal while the body runs; afterwards all is as
    before.
    """

    def called(number: int, _: FrameType | None) -> None:
        handler(number)

    before = {number: signal.signal(number, called) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
