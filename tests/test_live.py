"""What a run shows of itself, from what a run has: no clock of a real one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.ledger.devices.reader import Reading
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.runs.live import Live
from pipeline.store.artifacts import write_json


def expected(seconds: float) -> dict[str, float]:
    return {"value": seconds, "low": seconds / 2, "high": 2 * seconds}


def part(what: str, arm: str | None, seconds: float | None) -> dict[str, Any]:
    return {
        "what": what,
        "arm": arm,
        "seed": None if arm is None else 0,
        "like": {},
        "flops": None,
        "expected_s": None if seconds is None else expected(seconds),
        "source": "earlier runs",
        "actual_s": None,
    }


PARTS = [
    part("work", "teacher", 100.0),
    part("assess", "teacher", 10.0),
    part("work", "student", 50.0),
    part("assess", "student", 7.0),
    part("compare", None, 5.0),
    part("overhead", None, 3.0),
]


def live(tmp_path: Path, *, parts: Any = PARTS, missing: Any = (), **more: Any) -> Live:
    """Return the view of the teacher at work."""
    hours = {"expected": expected(0.05), "why_missing": None, "actual": None}
    record = {
        "settings": "",
        "device": "cpu",
        "devices": 1,
        "parts": parts,
        "missing": list(missing),
        "totals": {"device_hours": hours},
    }
    write_json(tmp_path / "forecast.json", record)
    session = SimpleNamespace(
        folder=tmp_path,
        clock=SimpleNamespace(current="forward"),
        device=SimpleNamespace(type=more.get("device", "cpu")),
        sampler=more.get("sampler"),
        run=SimpleNamespace(budget=SimpleNamespace(device_hours=more.get("budget"))),
    )
    timeline = SimpleNamespace(spent_hours=more.get("spent", lambda: 0.02))
    book = SimpleNamespace(rows=more.get("rows", []))
    running: Any = SimpleNamespace(session=session, timeline=timeline, book=book)
    return Live(running, "teacher", 0)


def test_what_is_left_is_the_stage_and_all_that_has_not_begun(tmp_path: Path) -> None:
    said = live(tmp_path, budget=0.1).of_run(30.0)
    assert said == [
        "72.0 s spent",
        "forecast 90.0 s to 6.00 min",
        "20% of the budget",
        # 30 s of steps, its assessment, the student, the comparison pass
        "102 s left",
    ]
    done = [{"arm": "student", "seed": 0}]
    assert live(tmp_path, rows=done).of_run(30.0)[-1] == "45.0 s left"


def test_what_is_not_foreseen_is_not_said(tmp_path: Path) -> None:
    unknown = [*PARTS[:-3], part("assess", "student", None)]
    for each in (live(tmp_path, parts=unknown), live(tmp_path, missing=["work of student"])):
        assert each.of_run(30.0) == ["72.0 s spent", "forecast 90.0 s to 6.00 min"]
    (tmp_path / "forecast.json").unlink()
    without = live(tmp_path)
    (tmp_path / "forecast.json").unlink()
    without = Live(without.running, "teacher", 0)
    assert without.of_run(30.0) == ["72.0 s spent"]


def test_the_loss_is_the_last_that_was_read(tmp_path: Path) -> None:
    view = live(tmp_path)
    assert view.of_stage()[0] == "forward"
    view.read({"loss": 2.3456})
    view.read({"validation": 2.0})
    view.read({"loss": None})
    assert list(view.of_stage())[:2] == ["loss 2.346", "forward"]
    assert view.of_stage()[2].startswith("cpu ")


def test_an_accelerator_is_as_busy_as_its_counters_say(tmp_path: Path) -> None:
    readings = [Reading(at_ns=1, uuid="a", busy=0.5), Reading(at_ns=1, uuid="b", busy=1.0)]
    reader: Any = SimpleNamespace(uuids=("a", "b"), why=None, read=lambda: tuple(readings))
    sampler = Sampler(reader)
    view = live(tmp_path, device="xpu", sampler=sampler)
    assert view.of_stage() == ["forward"]
    sampler.tick()
    assert view.of_stage() == ["forward", "xpu 75% busy"]


def test_whatever_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> float:
        raise RuntimeError("changed while it was read")

    view = live(tmp_path, spent=broken)
    assert view.of_run(1.0) == ()
