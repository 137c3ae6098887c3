"""MLflow from the journal: once, truly, and never in the way, against real SQLite stores, servers and processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock
from make_result import make_pairs, make_row, make_run, make_unfinished, null, value
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INTERNAL_ERROR
from sqlalchemy.exc import SQLAlchemyError

from pipeline import assemble
from pipeline.config import Run
from pipeline.ledger.journal import Journal, read_events
from pipeline.metrics import CATALOGUE
from pipeline.redact import REDACTED
from pipeline.sync import LOG, main
from pipeline.tracking import declared_uri, deliver, store_errors, ui_command

ARMS = ("teacher", "student")


@pytest.fixture(autouse=True)
def no_mlflow_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after its migrations, which take seconds; made once and copied."""
    root = tmp_path_factory.mktemp("empty-store")
    MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """A folder `mlruns` whose store is there already."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def start(
    journal: Journal, run_id: str, *, attempt: int = 1, uri: str | None = None, mlflow: bool = True, **tags: str
) -> None:
    journal.write(
        "run_start", run_id=run_id, started_ns=0, attempt=attempt, recipe="distill", question="is it worth it?",
        experiment="distill", tracking_uri=uri, tags=tags,
        params={"training.steps": 4, "hub.api_key": "hunter2", "student.config.odd_key*": 1,
                "tracking.mlflow": mlflow},
        datasets=[{"name": "d", "digest": "a" * 60, "split": "test", "num_documents": 3}],
    )  # fmt: skip


def stage(journal: Journal, arm: str, *, attempt: int = 1) -> None:
    journal.write("stage_start", arm=arm, stage=arm, type="train", seed=0, attempt=attempt, params={"steps": 4},
                  depends_on=[])  # fmt: skip
    for step in (1, 2):
        journal.write("points", arm=arm, seed=0, attempt=attempt, step=step, values={"loss": 3.0 - step})


def end(journal: Journal, rows: list[dict[str, Any]], status: str = "FINISHED", why: str | None = None) -> None:
    journal.write("comparisons", comparisons=make_pairs("distill")[:1])
    journal.write("run_end", status=status, why=why, primary_arm="student", run=make_run(rows), description="x" * 9000,
                  files=["report.md"])  # fmt: skip


def write_run(
    root: Path, run_id: str = "run-1", *, uri: str | None = None, ended: bool = True, mlflow: bool = True
) -> Path:
    folder = root / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("# report")
    journal = Journal(folder / "journal.jsonl")
    start(journal, run_id, uri=uri, mlflow=mlflow, team="vision")
    rows = [make_row(arm) for arm in ARMS]
    for row in rows:
        stage(journal, row["arm"])
        journal.write("row", row=row)
    if ended:
        end(journal, rows)
    journal.close()
    return folder


def store(root: Path) -> tuple[MlflowClient, dict[str, Any]]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    return client, {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def everything(root: Path) -> dict[str, Any]:
    """Return all that a store holds of the runs, ids of other runs left out."""
    client, runs = store(root)
    return {
        name: (run.info.status, run.info.start_time, run.info.end_time, run.data.params,
               {key: value for key, value in run.data.tags.items() if key != "mlflow.parentRunId"},
               {key: [(point.step, point.timestamp, point.value)
                      for point in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics},
               len(run.inputs.dataset_inputs), len(run.outputs.model_outputs))
        for name, run in runs.items()
    }  # fmt: skip


# -- what is delivered ----------------------------------------------------------------------------------------------


def test_a_run_is_delivered_once_with_all_it_holds(root: Path) -> None:
    folder = write_run(root)
    assert deliver(folder) == len(read_events(folder / "journal.jsonl"))
    client, runs = store(root)
    parent, student = runs["run-1"], runs["student"]
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(("run-1", *ARMS), "FINISHED")
    assert student.data.tags["mlflow.parentRunId"] == parent.info.run_id
    row = make_row("student")
    assert parent.data.metrics["quality/primary"] == row["quality"]["bits_per_byte"]["v"]
    assert parent.data.metrics["compute/device_hours"] == row["ledger"]["device_hours"]["attached"]["v"]
    assert student.data.tags["null.compute/gpu_hours"]
    assert "compute/gpu_hours" not in student.data.metrics
    assert parent.data.tags["team"] == "vision"
    assert len(parent.data.tags["mlflow.note.content"]) == 8000
    assert [point.step for point in client.get_metric_history(student.info.run_id, "train/loss")] == [1, 2]
    assert all(len(client.get_metric_history(student.info.run_id, key)) == 1 for key in student.data.metrics
               if not key.startswith("train/"))  # fmt: skip
    assert [item.dataset.digest for item in parent.inputs.dataset_inputs] == ["a" * 36]
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == ["report.md"]
    assert parent.data.params["hub.api_key"] == REDACTED
    assert parent.data.params["student.config.odd_key_"] == "1"  # MLflow takes no star
    for run in runs.values():
        assert {key.partition("/")[0] for key in run.data.metrics} <= {
            "compute", "quality", "serving", "savings", "cost", "train"
        }  # fmt: skip
        core = {metric.key for metric in CATALOGUE if metric.core and (metric.scope == "row" or run is parent)}
        assert core <= set(run.data.metrics)


def test_the_parent_speaks_of_all_attempts_and_seeds_of_the_primary_arm(root: Path) -> None:
    """Hand-worked: seed 0 took 2 h in a killed and 4 h in a finished attempt, seed 1 took 8 h: 7 h a seed."""

    def row(seed: int, attempt: int, hours: float, bits: float, status: str = "FINISHED") -> dict[str, Any]:
        made = make_row("student", seed=seed, attempt=attempt, status=status)
        made["ledger"]["device_hours"]["attached"] = value(hours)
        made["quality"] = {"bits_per_byte": value(bits)} if status == "FINISHED" else {}
        return made

    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1")
    rows = [row(0, 1, 2.0, 0.0, "KILLED"), row(0, 2, 4.0, 2.0), row(1, 1, 8.0, 3.0), make_row("teacher")]
    for each in rows:
        journal.write("row", row=each)
    end(journal, rows)
    deliver(folder)
    _, runs = store(root)
    assert runs["run-1"].data.metrics["compute/device_hours"] == 7.0
    assert runs["run-1"].data.metrics["quality/primary"] == 2.5
    assert {name: run.info.status for name, run in runs.items()} == {
        "run-1": "FINISHED", "teacher": "FINISHED", "student": "KILLED", "student seed 0 attempt 2": "FINISHED",
        "student seed 1": "FINISHED",
    }  # fmt: skip


def test_a_null_that_gets_its_value_in_a_later_attempt_is_null_no_more(root: Path) -> None:
    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1")
    row = make_row("student")
    journal.write("row", row={**row, "serving": {"device_s_per_1k_units": null("not served")}})
    end(journal, [row], "KILLED", why="interrupted")
    deliver(folder)
    student = lambda: store(root)[1]["student"].data
    assert student().tags["null.serving/device_s_per_1k_units"] == "not served"
    assert store(root)[1]["run-1"].data.tags["why"] == "interrupted"
    start(journal, "run-1", attempt=2)
    journal.write("serving", rows=[{name: row[name] for name in ("arm", "seed", "attempt", "serving")}])
    end(journal, [row])
    deliver(folder)
    assert "null.serving/device_s_per_1k_units" not in student().tags
    assert student().metrics["serving/device_s_per_1k_units"] == 0.6
    client, runs = store(root)
    assert "why" not in runs["run-1"].data.tags
    history = client.get_metric_history(runs["run-1"].info.run_id, "quality/primary")
    assert len(history) == 1  # what did not change is not logged again


def test_artifacts_are_logged_models_of_their_runs(root: Path) -> None:
    deliver(write_run(root))
    client, runs = store(root)
    row = make_row("student")
    (output,) = runs["student"].outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert model.tags["digest"] == row["artifact"]["digest"]
    assert model.tags["path"] == row["artifact"]["path"]
    assert model.source_run_id == runs["student"].info.run_id
    assert model.status == "READY"


def test_a_reused_artifact_is_the_model_of_the_run_that_made_it(root: Path) -> None:
    deliver(write_run(root, "run-1"))
    folder = root / "runs" / "run-2"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-2")
    rows = [make_row(arm, reused="run-1") for arm in ARMS]
    for row in rows:
        journal.write("row", row=row)
    end(journal, rows)
    deliver(folder)
    client, _ = store(root)
    experiment = client.get_experiment_by_name("distill")
    assert len(client.search_logged_models([experiment.experiment_id])) == len(ARMS)
    first, second = (
        next(run for run in client.search_runs([experiment.experiment_id])
             if run.data.tags["pipeline.run"] == f"{run_id}/student") for run_id in ("run-1", "run-2")
    )  # fmt: skip
    assert second.data.tags["reused"] == "run-1"
    assert second.data.tags["reused.mlflow_run"] == first.info.run_id
    assert [item.model_id for item in second.outputs.model_outputs] == [
        item.model_id for item in first.outputs.model_outputs
    ]


def test_delivering_again_or_with_its_memory_lost_changes_nothing(root: Path) -> None:
    folder = write_run(root)
    deliver(folder)
    before = everything(root)
    assert deliver(folder) == 0
    (folder / "mlflow.json").unlink()  # as if the process died between the last write and remembering it
    assert deliver(folder) > 0
    assert everything(root) == before


def test_whatever_an_outage_interrupts_is_delivered_once(
    root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks at every second call of a delivery, one later each time, until one comes through."""
    folder = write_run(root)
    other = root / "other"
    shutil.copytree(folder, other / "runs" / folder.name)
    shutil.copy(empty_store, other)
    left, outages = 0, 0

    def breaking(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("connection lost")
            return original(*args, **kwargs)

        return call

    calls = ("create_run", "log_batch", "set_tag", "log_inputs", "create_logged_model", "finalize_logged_model",
             "log_outputs", "log_artifact", "set_terminated", "update_run")  # fmt: skip
    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(MlflowClient, name, breaking(getattr(MlflowClient, name)))
        while True:
            left = 1 + 4 * outages
            try:
                deliver(folder)
                break
            except OSError:
                outages += 1
    assert outages > 5
    deliver(other / "runs" / folder.name)
    assert everything(root) == everything(other)


def test_a_store_that_was_deleted_gets_everything_again_from_sync(root: Path, empty_store: Path) -> None:
    folder = write_run(root)
    deliver(folder)
    before = everything(root)
    shutil.copy(empty_store, root / "mlflow.db")
    assert deliver(folder) == 0  # the next run's writer leaves it at that
    assert main([str(root)]) == 0
    assert everything(root) == before


def test_a_run_that_goes_on_is_whole_in_a_store_that_lost_its_beginning(root: Path, empty_store: Path) -> None:
    folder = write_run(root, ended=False)
    deliver(folder)
    shutil.copy(empty_store, root / "mlflow.db")
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1", attempt=2)
    end(journal, [make_row("student")])
    journal.close()
    deliver(folder)
    _, runs = store(root)
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(("run-1", *ARMS), "FINISHED")
    assert runs["run-1"].data.params["training.steps"] == "4"
    assert runs["student"].data.metrics["train/loss"] == 1


def test_what_was_thrown_away_in_the_ui_stays_away(root: Path) -> None:
    folder = write_run(root)
    deliver(folder)
    client, runs = store(root)
    for run in runs.values():
        client.delete_run(run.info.run_id)
    assert main([str(root)]) == 0
    assert store(root)[1] == {}


def test_four_processes_may_meet_a_fresh_store(tmp_path: Path) -> None:
    folders = [write_run(tmp_path, f"run-{number}") for number in range(3)]
    commands = [[sys.executable, "-m", "pipeline.sync", str(folder)] for folder in [*folders, folders[0]]]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    assert [process.communicate(timeout=120)[1] for process in processes] == [""] * 4
    _, runs = store(tmp_path)
    assert {name for name in runs if name.startswith("run-")} == {"run-0", "run-1", "run-2"}


# -- statuses -------------------------------------------------------------------------------------------------------


def test_a_run_whose_process_went_without_a_word_is_killed_and_may_go_on(root: Path) -> None:
    folder = write_run(root, ended=False)
    journal = Journal(folder / "journal.jsonl")
    stage(journal, "control_steps")
    with FileLock(folder / ".lock"):  # it lives
        deliver(folder)
        statuses = {name: run.info.status for name, run in store(root)[1].items()}
        assert statuses == {"run-1": "RUNNING", "teacher": "FINISHED", "student": "FINISHED",
                            "control_steps": "RUNNING"}  # fmt: skip
    assert main([str(root)]) == 0
    statuses = {name: run.info.status for name, run in store(root)[1].items()}
    assert statuses == {"run-1": "KILLED", "teacher": "FINISHED", "student": "FINISHED", "control_steps": "KILLED"}
    start(journal, "run-1", attempt=2)
    row = make_row("control_steps", attempt=2)
    stage(journal, "control_steps", attempt=2)
    with FileLock(folder / ".lock"):
        deliver(folder)
        assert store(root)[1]["run-1"].info.status == "RUNNING"
        journal.write("row", row=row)
        end(journal, [row])
    deliver(folder)
    statuses = {name: run.info.status for name, run in store(root)[1].items()}
    assert statuses == {"run-1": "FINISHED", "teacher": "FINISHED", "student": "FINISHED", "control_steps": "KILLED",
                        "control_steps seed 0 attempt 2": "FINISHED"}  # fmt: skip


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "FINISHED"])
def test_a_stage_that_left_no_row_ends_with_its_run(root: Path, status: str) -> None:
    """Ctrl-C, SIGTERM or a crash may come between a stage's start and its window."""
    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1")
    rows = [make_unfinished("teacher", "FAILED", "diverged"), make_unfinished("control_steps", "SKIPPED", "no GPU")]
    for row in rows:
        journal.write("row", row=row)
    stage(journal, "student")
    end(journal, [make_row("teacher")], status, why="told")
    deliver(folder)
    _, runs = store(root)
    assert {name: run.info.status for name, run in runs.items()} == {
        "run-1": status, "teacher": "FAILED", "control_steps": "FINISHED",
        "student": "FAILED" if status == "FAILED" else "KILLED",
    }  # fmt: skip
    assert runs["control_steps"].data.tags["status"] == "SKIPPED"
    assert runs["teacher"].data.tags["why"] == "diverged"
    assert runs["run-1"].data.tags["why"] == "told"


PARENT = """
import sys, time
from pathlib import Path
from filelock import FileLock
from pipeline.opening import _start_writer
folder = Path(sys.argv[1])
lock = FileLock(folder / ".lock")
lock.acquire()
writer = _start_writer(folder)
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
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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


@pytest.mark.faults
def test_the_writer_outlives_a_killed_run_and_says_so(root: Path) -> None:
    folder = write_run(root, ended=False)
    run, writer = _run_with_a_writer(folder)
    _until(lambda: (folder / "mlflow.json").is_file())  # it delivers while the run works
    assert store(root)[1]["run-1"].info.status == "RUNNING"
    assert os.getsid(writer) != os.getsid(run.pid)  # a terminal's Ctrl-C does not reach it
    assert os.getpriority(os.PRIO_PROCESS, writer) == 19
    weight = Path(f"/proc/{writer}/autogroup")
    assert not weight.exists() or weight.read_text().split()[-1] == "19"  # sessions are weighed before processes
    held = {os.readlink(link) for link in Path(f"/proc/{writer}/fd").iterdir()}
    assert str(folder / ".lock") not in held
    assert os.readlink(f"/proc/{writer}/fd/1") == os.devnull
    assert run.stdin is not None
    run.stdin.write("die\n")  # a dying process lets go of the writer before it lets go of its lock
    run.stdin.flush()
    time.sleep(1)
    assert not _gone(writer)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=30)
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
        "run-1": "FINISHED", "run-2": "KILLED"
    }  # fmt: skip
    assert (folder / LOG).read_text() == ""


STAND_INS = {
    "import sys; sys.stdin.read()": "MLflow: mlflow ui --backend-store-uri sqlite:///",
    "import sys; sys.exit('chatter\\nMLflow cannot be reached (why)')": "MLflow cannot be reached (why); `python -m",
    "import os; os._exit(3)": "the writer to MLflow crashed; `python -m pipeline.sync",
    "import time; time.sleep(60)": "MLflow did not answer within 1 s; its writer goes on, and `python -m pipeline.sync",
}


@pytest.mark.parametrize("code", STAND_INS)
def test_the_run_waits_for_its_writer_a_bounded_time_and_says_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    folder = tmp_path / "runs" / "run-1"
    folder.mkdir(parents=True)
    monkeypatch.setattr(assemble, "DELIVERY_S", 1.0)
    with (folder / LOG).open("wb") as log:
        writer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=log)
    attempt: Any = SimpleNamespace(folder=folder, run=Run())
    assert assemble._delivered(attempt, writer).startswith(STAND_INS[code])
    writer.kill()
    writer.wait()


def test_ctrl_c_while_waiting_for_mlflow_is_no_crash(tmp_path: Path) -> None:
    class Interrupted:
        stdin = None

        def wait(self, _: float) -> int:
            raise KeyboardInterrupt

    attempt: Any = SimpleNamespace(folder=tmp_path / "runs/run-1", run=Run())
    writer: Any = Interrupted()
    assert assemble._delivered(attempt, writer).startswith("not waiting for MLflow; its writer goes on")


# -- servers that do not answer -------------------------------------------------------------------------------------


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
    command = [sys.executable, "-m", "pipeline.sync", str(folder)]
    there = {**os.environ, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "MLflow cannot be reached" in done.stderr
    assert "the journal keeps everything" in done.stderr
    assert "Traceback" not in done.stderr
    assert deliver(folder) > 0
    assert store(root)[1]["run-1"].info.status == "FINISHED"


def test_a_server_that_never_answers_is_given_up_in_bounded_time(root: Path, silent_server: str) -> None:
    folder = write_run(root)
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    there = {**os.environ, "MLFLOW_TRACKING_URI": silent_server, **quick}
    command = [sys.executable, "-m", "pipeline.sync", "--follow", str(folder), str(os.getpid())]
    done = subprocess.run(command, env=there, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "MLflow cannot be reached" in done.stderr


def test_the_environment_names_the_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    deliver(write_run(root / "elsewhere", uri="http://127.0.0.1:9"))
    assert "run-1" in store(root)[1]
    assert not (root / "elsewhere" / "mlflow.db").exists()


def test_where_a_run_went_is_noted_without_a_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert declared_uri(None) is None
    assert declared_uri("http://a:5000") == "http://a:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pw@b")
    assert declared_uri("http://a:5000") == "https://b"
    assert ui_command(tmp_path, "http://a:5000") == "open https://b"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert ui_command(tmp_path) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("name", ["MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_the_environment_names_the_experiment(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.create_experiment("mine")
    monkeypatch.setenv(name, "mine" if name.endswith("NAME") else experiment)
    deliver(write_run(root))
    assert len(client.search_runs([experiment])) == 1 + len(ARMS)


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
    journal.write_text(journal.read_text().replace('"experiment": "distill"', '"experiment": "gone"'))
    write_run(root, "run-2")
    assert main([str(root)]) == 1
    assert {name for name in store(root)[1] if name.startswith("run-")} == {"run-0", "run-2"}


def test_a_journal_that_has_not_begun_is_left_alone(root: Path) -> None:
    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    assert deliver(folder) == 0
    (folder / "journal.jsonl").write_text('{"e": "run_sta')
    assert deliver(folder) == 0
    assert not (folder / "mlflow.json").exists()


def test_servers_from_before_logged_models_get_tags(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise MlflowException("no such endpoint", error_code=ENDPOINT_NOT_FOUND)

    def refused(*_: Any, **__: Any) -> None:
        raise MlflowException("no", error_code=INTERNAL_ERROR)

    folder = write_run(root)
    monkeypatch.setattr(MlflowClient, "search_logged_models", refused)
    with pytest.raises(MlflowException, match="no"):  # another trouble is no reason to go without
        deliver(folder)
    monkeypatch.setattr(MlflowClient, "search_logged_models", unknown)
    deliver(folder)
    tags = store(root)[1]["student"].data.tags
    assert tags["model.linked"] == "no: this MLflow server has no logged models"
    assert tags["model.digest"] == make_row("student")["artifact"]["digest"]


def test_mlflow_skinny_has_no_sqlalchemy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SQLAlchemyError in store_errors()
    monkeypatch.setitem(sys.modules, "sqlalchemy.exc", None)
    assert store_errors() == (MlflowException, OSError)


@pytest.mark.slow
def test_a_real_server_gets_what_a_file_gets(root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(root)
    other = root / "other"
    shutil.copytree(folder, other / "runs" / folder.name)
    shutil.copy(empty_store, other)
    deliver(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{other / 'mlflow.db'}",
               "--artifacts-destination", str(other / "a")]  # fmt: skip
    nothing = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        _until(lambda: _answers(port))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        assert deliver(other / "runs" / folder.name) > 0
        assert deliver(other / "runs" / folder.name, look_again=True) == 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert everything(other) == everything(root)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_sync_refuses_a_folder_without_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(root)]) == 1
    assert "holds no runs" in capsys.readouterr().err
    assert main(["--help"]) == 0
