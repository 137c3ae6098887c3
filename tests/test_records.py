"""Checksums of records and of journal lines: what still looks right, and is not what was written,
is not believed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.ledger.journal import Journal, read_events, read_first
from pipeline.ledger.records import RUN, read_record, sealed, sound_events, why_damaged
from pipeline.runs.resume import why_unusable
from pipeline.store.artifacts import Store, write_json

STATE = {"key": "k", "status": "FAILED", "pid": None, "attempt": 2, "spent_device_hours": 0.5}


def test_a_number_that_was_changed_is_found_by_the_checksum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    write_json(path, sealed(STATE))
    assert read_record(path, RUN) == STATE
    path.write_text(path.read_text().replace("0.5", "0.6"))
    assert read_record(path, RUN, so="that run is not resumed") is None
    assert read_record(path, RUN, so="that run is not resumed") is None
    said = f"note: {path} is damaged (it does not have its checksum) and that run is not resumed\n"
    assert capsys.readouterr().out == said  # once
    write_json(path, STATE)  # as older releases did
    assert read_record(path, RUN) == STATE


def test_the_store_seals_what_it_remembers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.remember("serving", "k", {"run_id": "r", "elapsed_ns": 7})
    path = tmp_path / "serving" / "k.json"
    assert store.recall("serving", "k") == {"run_id": "r", "elapsed_ns": 7}
    path.write_text(path.read_text().replace("7,", "8,"))
    assert store.recall("serving", "k") is None


def test_a_line_that_was_changed_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    for attempt in (1, 2):
        journal.write("run_start", attempt=attempt, question='an odd one", "crc": "00000000"}')
    journal.close()
    assert [event["attempt"] for event in read_events(path)] == [1, 2]
    assert "crc" not in (read_first(path) or {})
    path.write_text(path.read_text().replace('"attempt": 1', '"attempt": 3'))
    assert [event["attempt"] for event in read_events(path, checked=True)] == [2]
    assert [event["attempt"] for event in read_events(path)] == [3, 2]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"attempt": 0}, "attempt is 0"),
        ({"attempt": "2"}, "attempt is no integer"),
        ({"status": "DONE"}, "status is 'DONE'"),
        ({"key": None}, "key is no string"),
        ({"spent_device_hours": -1}, "spent_device_hours is -1"),
        ({"spent_device_hours": 1e300}, "spent_device_hours is 1e+300"),
        ({"attempt": 2**80}, "attempt is no integer"),
    ],
)
def test_a_damaged_record_is_said_by_its_field(change: dict[str, Any], why: str) -> None:
    assert why_damaged({**STATE, **change}, RUN) == why


def lines(*events: dict[str, Any]) -> list[dict[str, Any]]:
    start = {"e": "run_start", "t": 1.0, "mono_ns": 10, "attempt": 1, "started_ns": 5}
    return [
        start,
        *({"t": 1.0, "mono_ns": 100 + place, **event} for place, event in enumerate(events)),
    ]


OPEN = {"e": "open", "kind": "work", "arm": "a", "seed": 0, "attempt": 1, "start_ns": 20}
WINDOW = {
    "e": "window",
    "arm": "a",
    "seed": 0,
    "phases_ns": {"forward": 5},
    "window": {
        "kind": "work",
        "arm": "a",
        "seed": 0,
        "attempt": 1,
        "start_ns": 20,
        "end_ns": 60,
        "kept_ns": 40,
    },
}


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ((OPEN, WINDOW), None),
        ((OPEN,), None),
        ((), None),
        ((WINDOW,), "ended that had not begun"),
        ((OPEN, OPEN), "began before the one before it ended"),
        ((OPEN, WINDOW, {**OPEN, "start_ns": 50}), "began before the one before it ended"),
        (
            (OPEN, {**WINDOW, "window": {**WINDOW["window"], "end_ns": 10**9}}),
            "longer than its process lived",
        ),
        (
            (OPEN, {**WINDOW, "window": {**WINDOW["window"], "kept_ns": 41}}),
            "longer than its process lived",
        ),
        (({**OPEN, "attempt": 2},), "speaks of another one"),
    ],
)
def test_a_journal_whose_windows_do_not_fit_together_is_not_gone_on_with(
    events: Any, why: str | None
) -> None:
    found = why_unusable(lines(*events), 1)
    assert found is None if why is None else why in (found or "")
    assert why_unusable(lines(*events), 2) == "its attempts are not all there"


def test_lines_without_what_they_say_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = lines(OPEN, {**OPEN, "start_ns": "x"}, {"e": "row", "row": {}}, {"e": "something new"})
    assert [event["e"] for event in sound_events(events, tmp_path / "j")] == [
        "run_start",
        "open",
        "something new",
    ]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert json.dumps(said).count("that line is ignored") == 2
