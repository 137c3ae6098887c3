"""The journal: every line whole or left out, whatever tore it."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
import time
from pathlib import Path

import pytest

from pipeline.ledger.journal import Journal, heartbeat, read_events, read_first, read_new


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def kinds(path: Path) -> list[str]:
    return [event["e"] for event in read_events(path)]


@pytest.mark.parametrize(
    "torn",
    ['{"e": "row", "to', '{"e": "row", "value": "\u00e9'.encode()[:-1].decode("latin-1"), "\0\0\0"],
)
def test_a_line_torn_by_a_kill_takes_no_other_with_it(path: Path, torn: str) -> None:
    journal = Journal(path)
    journal.write("run_start")
    journal.close()
    with path.open("a", encoding="latin-1") as file:
        file.write(torn)
    journal = Journal(path)
    journal.write("run_start")
    journal.write("heartbeat")
    journal.close()
    assert kinds(path) == ["run_start", "run_start", "heartbeat"]


def test_a_line_torn_by_a_full_disk_takes_no_other_with_it(path: Path) -> None:
    journal = Journal(path)
    journal.write("run_start")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the kernel refuses what is beyond
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            journal.write("row", row="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.write("run_end")
    journal.close()
    assert path.read_bytes().count(b"\n") == 3
    assert kinds(path) == ["run_start", "run_end"]


def test_numbers_that_json_lacks_are_null_at_any_depth(path: Path) -> None:
    journal = Journal(path)
    journal.write(
        "points", values={"loss": float("nan"), "more": [float("inf"), (1.5, -float("inf"))]}
    )
    journal.close()
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["values"] == {
        "loss": None,
        "more": [None, [1.5, None]],
    }


@pytest.mark.parametrize(
    "odd", ["a\u2028b", "a\u0085b", "a\x0cb", "a\nb", "a\r\nb", "\U0001f600 é"]
)
def test_values_may_hold_any_line_end(path: Path, odd: str) -> None:
    journal = Journal(path)
    journal.write("run_start", question=odd)
    journal.close()
    (event,) = read_events(path)
    assert event["question"] == odd
    assert read_first(path) == event


def test_a_reader_goes_on_where_it_was_and_waits_for_whole_lines(path: Path) -> None:
    assert read_new(path, 0) == ([], 0)
    assert read_first(path) is None
    path.write_bytes(b'{"e": "run_st')
    assert read_new(path, 0) == ([], 0)
    path.write_bytes(b'{"e": "run_start"}')
    assert read_first(path) is None  # its end is still to come
    path.write_bytes(b'{"e": "run_start"}\n{"e": "poi')
    assert read_new(path, 0) == ([{"e": "run_start"}], 19)
    path.write_bytes(b'{"e": "run_start"}\n{"e": "points"}\n17\n')  # 17 is no event
    assert read_new(path, 19) == ([{"e": "points"}], 38)
    assert read_new(path, 38) == ([], 38)


def test_threads_do_not_write_into_each_others_lines(path: Path) -> None:
    journal = Journal(path)
    write = lambda name: [
        journal.write("points", name=name, values=list(range(300))) for _ in range(100)
    ]
    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    assert sorted(event["name"] for event in read_events(path)) == sorted("abcd" * 100)


def test_events_carry_the_injected_clock(path: Path) -> None:
    journal = Journal(path, now_ns=iter([5, 7]).__next__)
    journal.write("open")
    journal.write("window")
    journal.close()
    assert [event["mono_ns"] for event in read_events(path)] == [5, 7]


def test_signs_of_life_go_on_until_the_end_and_no_longer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ledger.journal.HEARTBEAT_S", 0.01)
    journal = Journal(path)
    with heartbeat(journal):
        deadline = time.monotonic() + 10
        while kinds(path).count("heartbeat") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = kinds(path).count("heartbeat")
    assert count >= 3
    time.sleep(0.05)
    assert kinds(path).count("heartbeat") == count


def test_signs_of_life_go_on_after_a_disk_was_full(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ledger.journal.HEARTBEAT_S", 0.01)
    journal, write, tries = Journal(path), os.write, []

    def full_at_first(file: int, line: bytes) -> int:
        tries.append(line)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, line)

    monkeypatch.setattr(os, "write", full_at_first)
    with heartbeat(journal):
        deadline = time.monotonic() + 10
        while kinds(path).count("heartbeat") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert kinds(path).count("heartbeat") >= 2


def test_the_last_line_is_the_latest_whoever_waited(path: Path) -> None:
    """A thread that waits for another's line to be on disk is stamped when its own turn comes."""
    journal, threads = Journal(path), list[threading.Thread]()
    with journal._lock:
        for number in range(8):
            threads.append(
                threading.Thread(
                    target=journal.write, args=("heartbeat",), kwargs={"number": number}
                )
            )
            threads[-1].start()
        released = time.monotonic_ns()
    for thread in threads:
        thread.join()
    journal.close()
    stamps = [event["mono_ns"] for event in read_events(path)]
    assert len(stamps) == 8
    assert stamps == sorted(stamps)
    assert stamps[0] >= released
