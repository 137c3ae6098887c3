"""A run that was killed, and one before it: one file of what they left is damaged, and the same
command goes on.

Stages only let an injected clock pass (`tests/test_running.py`); everything else is the product:
store, keys, assessments, journal, recovery, booking.
"""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_running as fake

from fuzz.mutate import damage, restore
from pipeline.ledger import records
from pipeline.ledger.converged import of_this_run
from pipeline.ledger.journal import read_events
from pipeline.ledger.records import sound_events
from pipeline.runs.resume import why_unusable

SLOW_S = 20.0  # of processor time
KINDS = (
    "keys/*.json",
    "assessments/*.json",
    "assessments/*.jsonl",
    "assessments/*.npy",
    "serving/*.json",
    "artifacts/*/artifact.json",
    "artifacts/*/model.txt",
)


def the_run() -> Any:
    run = fake.the_run()
    for stage in run.stages.values():
        stage.minutes, stage.ends, stage.resumes = [6.0] * 40, [], []
    run.stages["student"].checkpoints = [2.0, 4.0]
    return run


def make_world(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave one run that ended and one that was killed while its student was trained."""
    done = the_run()
    done.stages = {"teacher": done.stages["teacher"]}
    done.compare, done.primary_arm = [], "teacher"
    fake.invoke(root, "run-0", 1, done).session.journal.close()
    killed = the_run()
    killed.stages["student"].ends = ["killed"] + ["ok"] * 40
    with fake.deadly(monkeypatch):
        fake.invoke(root, "run-1", 1, killed).session.journal.close()
    fake.CLOCK.pass_minutes(600)


def go_on(root: Path) -> Any:
    """Start the same command again, as `pipeline.runs.opening` would: go on with the run, or begin
    another.
    """
    path = root / "runs" / "run-1" / "journal.jsonl"
    why = why_unusable(sound_events(read_events(path, checked=True), path), 1)
    with pytest.MonkeyPatch.context() as patch:
        read = lambda journal: sound_events(read_events(journal, checked=True), journal)
        patch.setattr(fake, "read_events", read)
        return fake.invoke(root, *(("run-1", 2) if why is None else ("run-2", 1)), the_run())


def try_worlds(
    root: Path, seed: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, int]:
    """Damage a file `count` times and go on; return how often with the run that was killed, and how
    often anew.

    Raises:
        AssertionError: Where anything came of it but a run that is whole and whose hours add up.
    """
    # no models there
    monkeypatch.setattr("pipeline.runs.comparison.other_tokenizers", lambda *_: False)
    rng, sound, work = random.Random(seed), root / "sound", root / "work"
    sound.mkdir(parents=True)
    make_world(sound, monkeypatch)
    ends = {"gone on with": 0, "begun anew": 0}
    for number in range(count):
        restore(sound, work)
        files = sorted(_files(work))
        path = rng.choice(
            [*files, *[work / "runs" / "run-1" / "journal.jsonl"] * (len(files) // 2)]
        )
        how = damage(path, rng, lines=path.suffix == ".jsonl")
        what, started = (seed, number, str(path.relative_to(work)), how), time.process_time()
        records._reported.clear()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                running = go_on(work)
                fake.of_run(running)
                of_this_run(running.session.folder, _totals(), 0.0, "model")
        except Exception as error:
            raise AssertionError(what) from error
        arms = {row["arm"] for row in running.book.rows if row["status"] == "FINISHED"}
        assert arms == set(running.session.run.stages), what
        running.session.journal.close()
        ends["gone on with" if running.session.run_id == "run-1" else "begun anew"] += 1
        assert time.process_time() - started < SLOW_S, what
    return ends


def _files(work: Path) -> Iterator[Path]:
    for kind in KINDS:
        yield from (work / "store").glob(kind)
    yield from (work / "runs").glob("*/journal.jsonl")


def _totals() -> dict[str, Any]:
    zero = {"value": 0.0, "provenance": "measured", "why_missing": None}
    hours = dict.fromkeys(("total", "work", "assess", "retry", "compare", "overhead"), zero)
    return {
        "device_hours": hours,
        "phases_device_ns": {"overhead": {}, "compare": {}},
        "reused": zero,
    }
