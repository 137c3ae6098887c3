"""`make fuzz`, or in `tests/`: `python -m fuzz.run [--count N] [--seed N] [--only
lines|records|worlds|NAME]`.

Tries N damaged records over all kinds, N / 2 command lines, and N / 10 killed runs with a damaged
file; ends with 1 where one came to a traceback, a hang or a wrong exit code, and says how to have
it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import test_running

from fuzz.lines import try_lines
from fuzz.records import TARGETS, try_records
from fuzz.worlds import try_worlds

PIECE = 50  # tries under one seed: a failure is found again quickly
SHARE = {"checkpoint": 0.2}  # of the tries of other kinds: it reads and writes models


def main() -> int:
    """Try all of it; return 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    asked = parser.parse_args()
    each = asked.count / (len(TARGETS) - len(SHARE) + sum(SHARE.values()))
    jobs: dict[str, tuple[float, Callable[[int, int, Path], dict[str, int]]]] = {
        name: (
            each * SHARE.get(name, 1),
            lambda seed, count, folder, name=name: try_records(name, seed, count, folder),
        )
        for name in TARGETS
    }
    jobs["lines"] = asked.count / 2, try_lines
    jobs["worlds"] = asked.count / 10, _worlds
    group = {"records": list(TARGETS)}.get(asked.only, [asked.only or ""])
    failed = [
        _many(name, *jobs[name], seed=asked.seed)
        for name in jobs
        if asked.only is None or name in group
    ]
    return int(any(failed))


def _worlds(seed: int, count: int, folder: Path) -> dict[str, int]:
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        root = test_running.root.__wrapped__(folder, patch)
        return try_worlds(root, seed, count, patch)


def _many(
    name: str, wanted: float, attempt: Callable[[int, int, Path], dict[str, int]], *, seed: int
) -> bool:
    """Try one kind in pieces; print what came of it, and return whether anything failed."""
    ends: dict[str, int] = {}
    failures, begun = 0, time.process_time()
    for piece in range(max(1, round(wanted / PIECE))):
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = attempt(seed * 100_003 + piece, PIECE, Path(folder) / "x")
            except AssertionError as error:
                failures += 1
                traceback.print_exception(error.__cause__ or error)
                print(f"FAILED {name}: {error.args[0] if error.args else error}", file=sys.stderr)
                continue
        for end, times in found.items():
            ends[end] = ends.get(end, 0) + times
    said = ", ".join(f"{times} {end}" for end, times in ends.items())
    print(
        f"{name}: {sum(ends.values())} tries, {failures} failures ({said}),"
        f" {time.process_time() - begun:.0f} s",
        flush=True,
    )
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
