"""`python -m pipeline recipe=NAME [key=value ...]`; alone, it lists the recipes."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

STARTED_NS = time.monotonic_ns()  # before any import that costs something: start-up is part of the bill


class Output:
    """An output whose reader may leave: hours of training do not end because `| head` has seen enough."""

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


if __name__ == "__main__":
    from pipeline.cli import main

    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    code = main(sys.argv[1:], started_ns=STARTED_NS)
    sys.stdout.flush()
    sys.exit(code)
