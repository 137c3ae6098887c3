"""The append-only journal: every figure lands here first, one JSON object a line.

A killed process leaves at most a torn last line, which reading skips. Each line ends with a
checksum, which is looked at where hours are booked from what a line says.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.config.redaction import redact_json
from pipeline.ledger.shapes import Event
from pipeline.ledger.values import from_schema_1

_CRC = re.compile(rb', "crc": "([0-9a-f]{8})"}\s*\Z')
HEARTBEAT_S = 5.0  # what SIGKILL can lose at most


class Journal:
    """Appends events to a file; safe to share between threads."""

    def __init__(self, path: Path, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        # With O_APPEND two processes cannot write over each other's lines.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        self._torn = _is_torn(path)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Everything but `points` is on disk when this returns."""
        fields = _finite(redact_json(fields))
        with self._lock:  # stamped inside: the last line is the latest, whoever waited for whom
            line = {"e": event, "t": time.time(), "mono_ns": self._now_ns(), **fields}
            self._append(_sealed(json.dumps(line, ensure_ascii=False, allow_nan=False).encode()))
            # Losing some points of a curve costs nothing; waiting for the disk at each step would.
            if event != "points":
                os.fsync(self._file)

    def _append(self, line: bytes) -> None:
        """Write a whole line. One that a kill or a full disk tore stays a line of its own, which
        reading skips.
        """
        rest = b"\n" + line if self._torn else line
        # Until the whole line is written: an error in between leaves it torn.
        self._torn = True
        while rest:
            # `os.write` may write a part only.
            rest = rest[os.write(self._file, rest) :]
        self._torn = False

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


@contextmanager
def heartbeat(journal: Journal) -> Generator[None]:
    """Leave a sign of life every few seconds, so that a killed process's hours are known but for
    the last of them.
    """
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            # a disk that is full for now costs this sign, and none of the later ones
            with suppress(OSError):
                journal.write("heartbeat")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _finite(value: Any) -> Any:
    """Return `value` with numbers that JSON cannot hold as null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path, *, checked: bool = False) -> list[Event]:
    """Return the events of a journal; lines torn by a kill are left out.

    Args:
        checked: Leave out lines without their checksum, too: hours are booked from what is read.
    """
    return read_new(path, 0, checked=checked)[0]


def read_new(path: Path, offset: int, *, checked: bool = False) -> tuple[list[Event], int]:
    """Return the events after the first `offset` bytes, and the offset to go on from; a line still
    being written waits.
    """
    if not path.is_file():
        return [], 0
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return read_lines(whole, checked=checked), offset + len(whole)


def read_lines(content: bytes, *, checked: bool = False) -> list[Event]:
    """Return the events in a part of a journal; see `read_events`."""
    # not splitlines: values may hold other line ends
    parsed = (_parse(line, checked=checked) for line in content.split(b"\n"))
    return [event for event in parsed if event is not None]


def read_first(path: Path) -> Event | None:
    """Return the first event of a journal, or None where it has none yet."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        whole = (line for line in file if line.endswith(b"\n"))
        return next((event for line in whole if (event := _parse(line)) is not None), None)


def _sealed(line: bytes) -> bytes:
    """Return a line with the checksum of what stands before it as its last member."""
    return b'%b, "crc": "%08x"}\n' % (line[:-1], zlib.crc32(line[:-1]))


def _is_sound(line: bytes) -> bool:
    """Whether a line is as it was written; lines of older releases have no checksum."""
    sealed = _CRC.search(line)
    return sealed is None or int(sealed[1], 16) == zlib.crc32(line[: sealed.start()])


def _parse(line: bytes, *, checked: bool = False) -> Event | None:
    try:
        event = None if checked and not _is_sound(line) else json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested for ever
        return None
    if not isinstance(event, dict) or not isinstance(event.get("e"), str):
        return None
    return from_schema_1({name: value for name, value in event.items() if name != "crc"})
