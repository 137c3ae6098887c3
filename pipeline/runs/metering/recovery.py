"""End the runs of meters that were killed: their journals and their ranks hold the hours."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any, cast

from pipeline.ledger.foreign import ENV
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.ranks import opened as opened_gpus
from pipeline.ledger.ranks import read_lives
from pipeline.ledger.records import METERED, sound_events, tell, why_damaged
from pipeline.ledger.shapes import Event, Metered
from pipeline.ledger.values import null
from pipeline.runs.metering.row import Facts
from pipeline.runs.metering.run import RECIPE, MeteredRun
from pipeline.runs.metering.watch import Used, as_reported
from pipeline.store.locks import lock_at

ELSEWHERE_S = 600.0  # without a sign of life, after which another node's run counts as ended
GONE = "the process that read it is gone"
KILLED_METER = "the meter was killed; hours up to its last sign of life"


def recover(root: Path) -> list[str]:
    """End the runs of meters that were killed; return their names. A run whose command goes on is
    left for later.
    """
    from filelock import Timeout

    ended: list[str] = []
    for folder in sorted((root.expanduser() / "runs").glob(f"*-{RECIPE}-*/")):
        if (folder / "result.json").exists():
            continue
        lock = lock_at(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue  # its meter is at work, or it is not ours to write to
        events = sound_events(read_events(folder / "journal.jsonl"), folder / "journal.jsonl")
        if _is_over(folder, events):
            _end(folder, lock, events)
            ended.append(folder.name)
        lock.release()
    return ended


def _is_over(folder: Path, events: list[Event]) -> bool:
    """Tell whether a command was metered here and goes on nowhere: it may outlive its meter."""
    if (
        not events
        or events[0]["e"] != "run_start"
        or not any(event["e"] == "open" for event in events)
    ):
        return False
    why = why_damaged(events[0], METERED)
    if why is not None:
        tell(folder / "journal.jsonl", why, "that run is not ended")
        return False
    if _start(events)["node"] != platform.node():  # not every shared file system shares locks
        return time.time() - events[-1]["t"] > ELSEWHERE_S
    mark = f"{ENV}={folder.resolve()}".encode()
    return not any(_has(event["pid"], mark) for event in events if event["e"] == "started")


def _start(events: list[Event]) -> Metered:
    """Return the first line of a metered command's journal, which METERED has let through."""
    return cast("Metered", events[0])


def _has(pid: int, mark: bytes) -> bool:
    """Tell whether a process was started with `mark` in its environment: its number alone may be
    another's by now.
    """
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _end(folder: Path, lock: Any, events: list[Event]) -> None:
    """Write what the killed meter could not, up to the last sign of life of it and of the ranks."""
    start = _start(events)
    opened = next(event for event in events if event["e"] == "open")
    lives, _ = read_lives(folder, start["node"])
    last = events[-1]
    # Ranks may have outlived their meter: their files go on.
    end_ns = max(last["mono_ns"], *(life.end_ns for life in lives), opened["start_ns"])
    seen = [Used.from_json(event["used"]) for event in events if event["e"] == "devices"]
    used = seen[-1] if seen and seen[-1].kind != "cpu" else as_reported(opened_gpus(lives), GONE)
    facts = Facts(
        name=start["name"],
        status="KILLED",
        why=KILLED_METER,
        start_ns=opened["start_ns"],
        end_ns=end_ns,
        used=used,
        host_peak=null(GONE),
        truncated=True,
    )
    run = MeteredRun(folder, Journal(folder / "journal.jsonl"), lock, start)
    # Wall time of the last sign of life, moved on by the monotonic clock.
    run.end(facts, now_ns=end_ns, t=last["t"] + (end_ns - last["mono_ns"]) / 1e9)
