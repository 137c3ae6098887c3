"""What a metered program says: phases on an injected clock, forks, threads, and nothing at all
where unmetered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.ledger import foreign
from pipeline.ledger.foreign import Reporter

PROGRAMS = Path(__file__).parent / "programs"


class Clock:
    """Time that passes when told."""

    now_ns = 1000

    def __call__(self) -> int:
        return self.now_ns

    def sleep(self, ns: int) -> None:
        self.now_ns += ns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "ranks").mkdir()
    return tmp_path


def written(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "ranks").glob("*")
    return json.loads(path.read_text())


def test_the_file_closes_to_the_nanosecond_with_a_phase_open(folder: Path) -> None:
    clock = Clock()
    reporter = Reporter(folder, now_ns=clock)
    clock.sleep(5)
    with reporter.phase("forward"):
        clock.sleep(70)
        with reporter.phase("h2d"):
            clock.sleep(600)
        reporter.flush()
        assert written(folder)["phases_ns"] == {"other": 5, "forward": 70, "h2d": 600}
        clock.sleep(8000)
        reporter.close()
    found = written(folder)
    assert found["phases_ns"] == {"other": 5, "forward": 8070, "h2d": 600}
    assert (found["start_ns"], found["end_ns"], found["ended"]) == (1000, 1000 + 8675, True)
    reporter.flush()  # the thread's, that came too late
    assert written(folder)["ended"] is True


def test_counts_add_up_from_any_thread(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(folder, now_ns=Clock())

    def elsewhere() -> None:
        with reporter.phase("eval"):
            reporter.count({"tokens": 2.0})

    threads = [threading.Thread(target=elsewhere) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reporter.count({"tokens": 3, "flops": 0.5})
    reporter.close()
    assert written(folder)["counts"] == {"tokens": 9, "flops": 0.5}
    assert written(folder)["phases_ns"] == {"other": 0}
    assert capfd.readouterr().err.count("phases of other threads") == 1


def test_flushes_of_another_thread_lose_and_double_nothing(folder: Path) -> None:
    reporter = Reporter(folder)
    done = threading.Event()

    def hammer() -> None:
        while not done.is_set():
            reporter.flush()

    thread, switched_s = threading.Thread(target=hammer), sys.getswitchinterval()
    thread.start()
    sys.setswitchinterval(1e-6)
    for _ in range(20_000):
        with reporter.phase("forward"), reporter.phase("h2d"):
            pass
    sys.setswitchinterval(switched_s)
    done.set()
    thread.join()
    reporter.close()
    found = written(folder)
    assert sum(found["phases_ns"].values()) == found["end_ns"] - found["start_ns"]


def test_an_error_inside_a_phase_closes_it(folder: Path) -> None:
    clock = Clock()
    reporter = Reporter(folder, now_ns=clock)

    def fail() -> None:
        with reporter.phase("backward"):
            clock.sleep(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.sleep(4)
    reporter.close()
    assert written(folder)["phases_ns"] == {"backward": 3, "other": 4}


def test_a_folder_that_is_gone_ends_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reporter = Reporter(tmp_path / "gone", now_ns=Clock())
    reporter.flush()
    reporter.flush()
    assert capfd.readouterr().err.count("phases cannot be written") == 1


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"tokens": -1}, ValueError, "tokens=-1 is negative or not finite"),
        ({"flops": float("nan")}, ValueError, "flops=nan is negative"),
        ({"steps": "3"}, TypeError, "steps must be a plain number, not str"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    given: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        pipeline.count(**given)


def test_a_phase_must_have_a_known_name_metered_or_not() -> None:
    with pytest.raises(ValueError, match="phase 'thinking' is not one of import, prepare"):
        pipeline.phase("thinking")


def test_unmetered_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(foreign.ENV, raising=False)
    monkeypatch.setattr(foreign, "_reporter", foreign._UNKNOWN)
    with pipeline.phase("forward"):
        pass
    assert foreign._reporter is None
    monkeypatch.setattr(foreign, "os", None)  # the environment was asked once
    assert pipeline.phase("forward") is pipeline.phase("backward") is foreign._NOTHING


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        "import sys; known = set(sys.modules); import pipeline; print(sorted(set(sys.modules) -"
        " known))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=PROGRAMS.parents[1]
    )
    assert done.stdout.strip() == "['__future__', 'pipeline']"
    code = (
        "import sys, pipeline; pipeline.phase('eval'); print(any(m in sys.modules for m in"
        " ('torch', 'numpy', 'yaml')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROGRAMS.parents[1]
    )
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'phases'"):
        _ = pipeline.phases  # type: ignore[attr-defined]


@pytest.mark.slow
def test_forks_and_data_loader_workers_are_no_ranks(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "workers.py")],
        env={**os.environ, foreign.ENV: str(folder), "RANK": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = written(folder)  # one file
    assert (found["rank"], found["counts"], found["ended"]) == (3, {"examples": 9}, True)
    assert set(found["phases_ns"]) == {"data_wait", "other"}
    assert sum(found["phases_ns"].values()) == found["end_ns"] - found["start_ns"]
    # the rank's own end, not that of a process it forked
    assert found["end_ns"] - int(done.stdout) < 0.4e9


FORK = """
import os, threading, pipeline
from pipeline.ledger import foreign
with pipeline.phase("eval"):
    held, free = threading.Event(), threading.Event()
    def flush():
        with foreign._reporter._lock:
            held.set()
            free.wait()
    threading.Thread(target=flush).start()
    held.wait()
    if os.fork() == 0:
        with pipeline.phase("forward"):
            pipeline.count(steps=1)
        os._exit(0)
    free.set()
print(os.wait()[1])
"""


def test_a_fork_in_the_middle_of_a_flush_does_not_hang(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        env={**os.environ, foreign.ENV: str(folder)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr
