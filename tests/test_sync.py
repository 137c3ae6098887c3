"""The writer beside a run, and `python -m pipeline sync`: real processes, servers that do not
answer, refusals.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from make_journal import ARMS, end, store, write_run
from make_result import make_row
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipeline.cli.commands.sync import main
from pipeline.ledger.journal import Journal
from pipeline.tracking import writer as background
from pipeline.tracking.deliver import deliver
from pipeline.tracking.writer import LOG, undelivered

PARENT = """
import sys, time
from pathlib import Path
from filelock import FileLock
from pipeline.tracking.writer import start_writer
folder = Path(sys.argv[1])
lock = FileLock(folder / ".lock")
lock.acquire()
writer = start_writer(folder)
print(writer.pid, flush=True)
dies = sys.stdin.readline() == "die\\n"
if not dies:
    lock.release()
writer.stdin.close()
time.sleep(600 * dies)
print(writer.wait(), flush=True)
"""


def _run_with_a_writer(folder: Path) -> tuple[subprocess.Popen[str], int]:
    command = [sys.executable, "-c", PARENT, str(folder)]
    run = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    return run, int(run.stdout.readline())


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _until(what: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert what()


@pytest.mark.slow
@pytest.mark.faults
def test_the_writer_outlives_a_killed_run_and_says_so(root: Path) -> None:
    folder = write_run(root, ended=False)
    run, writer = _run_with_a_writer(folder)
    _until(lambda: (folder / "mlflow.json").is_file())  # it delivers while the run works
    assert store(root)[1]["run-1"].info.status == "RUNNING"
    assert os.getsid(writer) != os.getsid(run.pid)  # a terminal's Ctrl-C does not reach it
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    # what holds locks is as quick as who waits for them
    assert os.getpriority(os.PRIO_PROCESS, writer) == ours
    weight = Path(f"/proc/{writer}/autogroup")
    # sessions are weighed before processes
    assert not weight.exists() or weight.read_text().split()[-1] == "0"
    held = {os.readlink(link) for link in Path(f"/proc/{writer}/fd").iterdir()}
    assert str(folder / ".lock") not in held
    assert os.readlink(f"/proc/{writer}/fd/1") == os.devnull
    assert run.stdin is not None
    run.stdin.write("die\n")  # a dying process lets go of the writer before it lets go of its lock
    run.stdin.flush()
    time.sleep(1)
    assert not _gone(writer)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=120)
    _until(lambda: _gone(writer))
    assert store(root)[1]["run-1"].info.status == "KILLED"


@pytest.mark.faults
def test_the_writer_ends_with_the_run_and_delivers_what_others_left(root: Path) -> None:
    folder = write_run(root, "run-1", ended=False)
    write_run(root, "run-2", ended=False)  # its process was killed long ago
    write_run(root, "run-3", mlflow=False)
    run, _ = _run_with_a_writer(folder)
    _until(lambda: (root / "runs/run-2/mlflow.json").is_file())
    journal = Journal(folder / "journal.jsonl")
    end(journal, [make_row(arm) for arm in ARMS])
    journal.close()
    said = run.communicate("\n", timeout=90)
    assert said == ("0\n", "")
    _, runs = store(root)
    assert {name: run.info.status for name, run in runs.items() if name.startswith("run-")} == {
        "run-1": "FINISHED",
        "run-2": "KILLED",
    }
    assert not [
        line
        for line in (folder / LOG).read_text().splitlines()
        if not line.startswith("waiting for ")
    ]


@pytest.mark.skipif(
    sys.platform != "linux", reason="priorities are counted by thread on Linux alone"
)
def test_mlflow_is_imported_at_the_lowest_priority_by_a_thread_that_holds_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def record() -> None:
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    monkeypatch.setattr("pipeline.tracking.deliver.import_mlflow", record)
    thread = threading.Thread(target=background._import_at_lowest_priority)
    thread.start()
    thread.join()
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


SLOW_IMPORT = """
import sys, time
if "--now" in sys.argv:
    print("anew", file=sys.stderr)
    raise SystemExit(5)
time.sleep(300)
"""


@pytest.mark.faults
def test_a_run_that_ends_does_not_wait_for_an_import_at_the_lowest_priority(tmp_path: Path) -> None:
    folder = write_run(tmp_path, ended=True)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/mlflow.py").write_text(SLOW_IMPORT)
    there = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path / 'fake'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "pipeline", "sync", "--follow", str(folder), str(os.getpid())]
    writer = subprocess.Popen(
        command, env=there, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _, said = writer.communicate("", timeout=60)  # standard input is closed: the run has ended
    assert set(said.splitlines()) == {"anew"}
    assert writer.returncode == 5
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19


STAND_INS = {
    "import sys; sys.stdin.read()": None,
    "import sys; sys.exit('chatter\\nMLflow cannot be reached (why)')": (
        "MLflow cannot be reached (why); `python -m"
    ),
    "import os; os._exit(3)": "the writer to MLflow crashed; `python -m pipeline sync",
    "import time; time.sleep(60)": (
        "MLflow has not taken all of this run within 1 s; its writer continues, and"
    ),
}


@pytest.mark.parametrize("code", STAND_INS)
def test_the_run_waits_for_its_writer_a_bounded_time_and_says_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    folder = tmp_path / "runs" / "run-1"
    folder.mkdir(parents=True)
    monkeypatch.setattr(background, "DELIVERY_S", 1.0)
    with (folder / LOG).open("wb") as log:
        writer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=log)
    said, wanted = undelivered(writer, folder), STAND_INS[code]
    assert said is wanted or (said or "").startswith(wanted or "!")
    writer.kill()
    writer.wait()


def test_ctrl_c_while_waiting_for_mlflow_is_no_crash(tmp_path: Path) -> None:
    class Interrupted:
        stdin = None

        def wait(self, _: float) -> int:
            raise KeyboardInterrupt

    writer: Any = Interrupted()
    said = undelivered(writer, tmp_path / "runs/run-1")
    again = f"`python -m pipeline sync {tmp_path}` delivers the rest"
    assert said == f"not waiting for MLflow; its writer continues, and {again}"


@pytest.mark.slow
def test_four_processes_may_meet_a_fresh_store(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, f"run-{number}") for number in range(3)]
    commands = [
        [sys.executable, "-m", "pipeline", "sync", str(folder)] for folder in [*folders, folders[0]]
    ]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    said = [process.communicate(timeout=120)[1].splitlines() for process in processes]
    assert not [line for lines in said for line in lines if not line.startswith("waiting for ")]
    _, runs = store(tmp_path)
    assert {name for name in runs if name.startswith("run-")} == {"run-0", "run-1", "run-2"}


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes every connection and never says a word."""
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                held.append(listener.accept()[0])
            except OSError:
                return

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()
    for connection in held:
        connection.close()


def test_a_dead_server_keeps_the_journal_and_the_rest_comes_later(root: Path) -> None:
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    folder = write_run(root)
    command = [sys.executable, "-m", "pipeline", "sync", str(folder)]
    there = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "MLflow cannot be reached" in done.stderr
    assert "the journal keeps everything" in done.stderr
    assert "Traceback" not in done.stderr
    assert deliver(folder) > 0
    assert store(root)[1]["run-1"].info.status == "FINISHED"


@pytest.mark.slow
def test_a_server_that_never_answers_is_given_up_in_bounded_time(
    root: Path, silent_server: str
) -> None:
    folder = write_run(root)
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    there = {**os.environ, "MLFLOW_TRACKING_URI": silent_server, **quick}
    command = [sys.executable, "-m", "pipeline", "sync", "--follow", str(folder), str(os.getpid())]
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "MLflow cannot be reached" in done.stderr


def test_a_run_that_the_store_refuses_does_not_keep_others_from_it(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    client.delete_experiment(client.create_experiment("gone"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    write_run(root, "run-1")
    with pytest.raises(MlflowException):
        deliver(root / "runs/run-1")
    assert main([str(root)]) == 1
    assert "run-1: MLflow refuses (" in capsys.readouterr().err
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    write_run(root, "run-0")
    journal = root / "runs/run-1/journal.jsonl"
    journal.write_text(
        journal.read_text().replace('"experiment": "distill"', '"experiment": "gone"')
    )
    write_run(root, "run-2")
    assert main([str(root)]) == 1
    assert {name for name in store(root)[1] if name.startswith("run-")} == {"run-0", "run-2"}


def test_sync_refuses_a_folder_without_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root)]) == 1
    assert "holds no runs" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_a_run_whose_folder_is_gone_says_so_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said = undelivered(writer, tmp_path / "runs/run-1")
    assert said is not None
    assert said.startswith("the writer to MLflow crashed; `python -m pipeline sync ")
