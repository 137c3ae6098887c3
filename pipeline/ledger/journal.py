"""The append-only journal: every figure lands here first, one JSON object a line.

A killed process leaves at most a torn last line, which reading skips.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Journal:
    """Appends events to a file; safe to share between threads."""

    def __init__(self, path: Path, *, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._now_ns = now_ns
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock = threading.Lock()
        if _is_torn(path):  # a killed process's last line stays a line of its own
            os.write(self._file, b"\n")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Everything but `points` is on disk when this returns."""
        line = {"e": event, "t": time.time(), "mono_ns": self._now_ns(), **_finite(fields)}
        with self._lock:
            os.write(self._file, (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
            if event != "points":
                os.fsync(self._file)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


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


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a journal; lines torn by a kill are left out."""
    events: list[dict[str, Any]] = []
    if not path.is_file():
        return events
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events
