"""What a scheduler sends before it takes a machine back, and how to listen for it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A run stops at its next step, with a checkpoint."""


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
