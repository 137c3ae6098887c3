"""`python -m pipeline recipe=NAME [key=value ...]` or `python -m pipeline COMMAND ...`; alone, it
lists the recipes.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any, NoReturn, TextIO

# before any import that costs something: start-up is part of the bill
# a rank began when the command did that started it; what it starts begins by itself
STARTED_NS = int(os.environ.pop("PIPELINE_STARTED_NS", "") or time.monotonic_ns())
# as in `errors.Exit`, which is not imported yet when they are needed
PREEMPTED, INTERRUPTED = 75, 130


class Output:
    """An output whose reader may leave: hours of training do not end because `| head` has seen
    enough.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the reader, or to nobody."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._lose_reader(len(text))

    def flush(self) -> None:
        """Flush to the reader, or to nobody."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lose_reader(0)

    def _lose_reader(self, written: int) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(argv: list[str]) -> int:
    """Run one command line; return its exit code, also where it is stopped while it starts."""
    from pipeline.cli.commands import COMMANDS, run_command
    from pipeline.cli.ranks import fall_silent, is_silent

    if argv and argv[0] in COMMANDS:
        return run_command(argv, started_ns=STARTED_NS)
    if is_silent():  # one of several speaks
        fall_silent()
    from pipeline.runs.signals import StoppedEarly, as_the_stop, ignore_all, listen_early

    listen_early()
    try:
        with as_the_stop():
            from pipeline.cli.main import main

            return main(argv, started_ns=STARTED_NS)
    except StoppedEarly as stop:
        print(f"stopped by {stop}; run the same command again", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted before anything began", file=sys.stderr)
        return INTERRUPTED
    finally:
        ignore_all()


def leave(code: int) -> NoReturn:
    """End the process with `code`, without taking down every imported module: with torch that takes
    two seconds.
    """
    import atexit

    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # between two statements of `run`
        code = INTERRUPTED
    leave(code)
