"""Locks keep processes apart, and a storage whose locks do not is refused in one line."""

from __future__ import annotations

import errno
import fcntl
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from here import here
from test_faults import SMALL

from pipeline.errors import UserError
from pipeline.store import locks
from pipeline.store.artifacts import Store, write_json
from pipeline.store.locks import check_locks, lock_at

ROOT = Path(__file__).resolve().parent.parent


def failing(number: int) -> Callable[..., None]:
    """Return a flock as storages without locks answer it."""

    def flock(*_: Any) -> None:
        raise OSError(number, "")

    return flock


STANDINS = {
    "nfs without its lock daemon": (failing(errno.ENOLCK), "has no locks of files"),
    "lustre without flock": (failing(errno.ENOSYS), "has no locks of files"),
    "user space": (failing(errno.EOPNOTSUPP), "has no locks of files"),
    "granted to everybody": (lambda *_: None, "its locks of files keep nobody off"),
}


@pytest.fixture(params=STANDINS)
def said(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have locks work as on such a storage; return what is to be said of it."""
    flock, said = STANDINS[request.param]
    monkeypatch.setattr(locks, "_sound", set())
    monkeypatch.setattr(fcntl, "flock", flock)
    return said


def test_a_storage_with_locks_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_sound", set())
    check_locks(tmp_path)
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    check_locks(tmp_path)
    assert list(tmp_path.iterdir()) == []
    check_locks(tmp_path / "missing")  # what opens it will say so


def test_a_storage_without_locks_is_refused_wherever_one_is_taken(
    said: str, tmp_path: Path
) -> None:
    for use in (check_locks, Store, lambda folder: lock_at(folder / "a.lock")):
        with pytest.raises(UserError, match=said) as error:
            use(tmp_path)
        assert str(error.value).startswith(f"tracking.root: {tmp_path}: ")
        assert "store.url" in str(error.value)


def test_a_run_there_is_refused_in_one_line_and_leaves_nothing(said: str, tmp_path: Path) -> None:
    done = here(tmp_path, "recipe=baseline", *SMALL)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("refused: tracking.root: ")
    assert said in done.stderr
    assert list((tmp_path / "mlruns").iterdir()) == []


def test_a_file_outside_of_a_store_is_written_without_locks(said: str, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1})
    assert (tmp_path / "a.json").read_text() == '{\n "b": 1\n}'


def test_locks_are_taken_by_one_function_alone() -> None:
    """Any other one would not be tried before."""
    taken = re.compile(r"FileLock\(|fcntl\.flock")
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "pipeline").rglob("*.py")
        if taken.search(path.read_text())
    }
    # what marks a file as being written holds nobody off
    assert found == {"pipeline/store/locks.py", "pipeline/store/artifacts.py"}


COUNT = """
import sys
from pathlib import Path
from pipeline.store.locks import lock_at
folder = Path(sys.argv[1])
for _ in range(200):
    with lock_at(folder / "a.lock"):
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
"""


def test_two_processes_hold_a_lock_in_turns(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    both = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], cwd=ROOT) for _ in range(2)
    ]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert (tmp_path / "count").read_text() == "400"
