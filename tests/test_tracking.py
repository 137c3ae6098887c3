"""From the journal to MLflow: what is delivered, once and truly, into real SQLite stores and a real
server.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from google.protobuf.json_format import ParseError
from make_journal import ARMS, TRACE, end, everything, stage, start, store, write_run
from make_result import make_row, make_unfinished, null, value
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, INTERNAL_ERROR
from sqlalchemy.exc import SQLAlchemyError

from pipeline.cli.commands.sync import main
from pipeline.config.redaction import REDACTED
from pipeline.ledger.journal import Journal, read_events
from pipeline.ledger.metrics import CATALOGUE
from pipeline.tracking.deliver import declared_uri, deliver, store_errors, ui_command


def test_a_run_is_delivered_once_with_all_it_holds(root: Path) -> None:
    folder = write_run(root)
    assert deliver(folder) == len(read_events(folder / "journal.jsonl"))
    client, runs = store(root)
    parent, student = runs["run-1"], runs["student"]
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ("run-1", *ARMS), "FINISHED"
    )
    assert student.data.tags["mlflow.parentRunId"] == parent.info.run_id
    row = make_row("student")
    assert parent.data.metrics["quality/primary"] == row["quality"]["bits_per_byte"]["value"]
    assert (
        parent.data.metrics["compute/device_hours"]
        == row["ledger"]["device_hours"]["attached"]["value"]
    )
    assert student.data.tags["null.compute/gpu_hours"]
    assert "compute/gpu_hours" not in student.data.metrics
    assert student.data.metrics["compute/wasted_data_wait_device_hours"] == pytest.approx(
        0.05 * 22 / 60
    )
    assert student.data.tags["waste"].startswith("data_wait 5%: raise batch_size")
    assert parent.data.tags["team"] == "vision"
    assert parent.data.tags["device"] == "NVIDIA H200"
    assert "mlflow.source.git.commit" not in parent.data.tags  # of an installed wheel: unknown
    assert len(parent.data.tags["mlflow.note.content"]) == 8000
    assert [
        point.step for point in client.get_metric_history(student.info.run_id, "train/loss")
    ] == [1, 2]
    assert all(
        len(client.get_metric_history(student.info.run_id, key)) == 1
        for key in student.data.metrics
        if not key.startswith("train/")
    )
    assert [item.dataset.digest for item in parent.inputs.dataset_inputs] == ["a" * 36]
    assert [item.path for item in client.list_artifacts(parent.info.run_id)] == [
        "report.md",
        "traces",
    ]
    traces = client.list_artifacts(parent.info.run_id, "traces/student-seed0")
    assert [item.path for item in traces] == [TRACE]
    assert parent.data.params["hub.api_key"] == REDACTED
    assert parent.data.params["student.config.odd_key_"] == "1"  # MLflow takes no star
    for run in runs.values():
        assert {key.partition("/")[0] for key in run.data.metrics} <= {
            "compute",
            "quality",
            "serving",
            "savings",
            "cost",
            "train",
        }
        core = {
            metric.key
            for metric in CATALOGUE
            if metric.core and (metric.scope == "row" or run is parent)
        }
        assert core <= set(run.data.metrics)


def test_what_limited_a_gpu_reaches_mlflow_with_the_meter_s_doubts(root: Path) -> None:
    row = make_row("student", gpu=True)
    record = row["ledger"]
    record["gpu_hours"]["busy"] = value(0.3)
    record["conditions"] |= {
        "throttle_share": value(0.25),
        "foreign_load": value(0.5),
        "truncated": True,
        "throttle_reasons": ["power cap", "power brake"],
    }
    record |= {
        "meter_valid": False,
        "meter_problems": ["busy is more than attached: 9 s", "energy suspect"],
    }
    deliver(write_run(root, rows=[row]))
    data = store(root)[1]["student"].data
    told = {
        name: data.metrics[f"compute/{name}"]
        for name in ("busy_gpu_hours", "throttle_share", "foreign_load")
    }
    assert told == {"busy_gpu_hours": 0.3, "throttle_share": 0.25, "foreign_load": 0.5}
    assert data.tags["null.compute/sm_active_gpu_hours"] == "no such counter in this run"
    assert (data.tags["throttled_by"], data.tags["truncated"]) == ("power cap, power brake", "True")
    assert data.tags["meter_problems"] == "busy is more than attached: 9 s; energy suspect"
    assert data.tags["meter_valid"] == "False"


def test_lm_eval_tasks_reach_mlflow_by_task_and_metric(root: Path) -> None:
    rows = [make_row(arm) for arm in ARMS]
    for row in rows:
        row["quality"] |= {
            "task/capitals/acc": value(0.75, n=24, ci=[0.55, 0.88], items="items.capitals.jsonl"),
            "task/capitals/exact_match.upper_case": value(0.5, n=24, ci=None, items="items"),
            "task/capitals/mcc": null("no score of each document"),
        }
    deliver(write_run(root, rows=rows))
    data = store(root)[1]["student"].data
    shown = {key: figure for key, figure in data.metrics.items() if key.startswith("quality/task")}
    assert shown == {
        "quality/task/capitals/acc": 0.75,
        "quality/task/capitals/exact_match.upper_case": 0.5,
    }
    assert data.tags["null.quality/task/capitals/mcc"] == "no score of each document"


def test_the_parent_speaks_of_all_attempts_and_seeds_of_the_primary_arm(root: Path) -> None:
    """Hand-worked: seed 0 took 2 h in a killed and 4 h in a finished attempt, seed 1 took 8 h: 7 h
    a seed.
    """

    def row(
        seed: int, attempt: int, hours: float, bits: float, status: str = "FINISHED"
    ) -> dict[str, Any]:
        made = make_row("student", seed=seed, attempt=attempt, status=status)
        made["ledger"]["device_hours"]["attached"] = value(hours)
        made["quality"] = {"bits_per_byte": value(bits)} if status == "FINISHED" else {}
        return made

    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1")
    rows = [
        row(0, 1, 2.0, 0.0, "KILLED"),
        row(0, 2, 4.0, 2.0),
        row(1, 1, 8.0, 3.0),
        make_row("teacher"),
    ]
    for each in rows:
        journal.write("row", row=each)
    end(journal, rows)
    deliver(folder)
    _, runs = store(root)
    assert runs["run-1"].data.metrics["compute/device_hours"] == 7.0
    assert runs["run-1"].data.metrics["quality/primary"] == 2.5
    assert {name: run.info.status for name, run in runs.items()} == {
        "run-1": "FINISHED",
        "teacher": "FINISHED",
        "student": "KILLED",
        "student seed 0 attempt 2": "FINISHED",
        "student seed 1": "FINISHED",
    }


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
    journal.write(
        "serving", rows=[{name: row[name] for name in ("arm", "seed", "attempt", "serving")}]
    )
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
        next(
            run
            for run in client.search_runs([experiment.experiment_id])
            if run.data.tags["pipeline.run"] == f"{run_id}/student"
        )
        for run_id in ("run-1", "run-2")
    )
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
    # as if the process died between the last write and remembering it
    (folder / "mlflow.json").unlink()
    assert deliver(folder) > 0
    assert everything(root) == before


def test_whatever_an_outage_interrupts_is_delivered_once(
    root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks at every second call of a delivery, one later each time, until one
    comes through.
    """
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

    calls = (
        "create_run",
        "log_batch",
        "set_tag",
        "log_inputs",
        "create_logged_model",
        "finalize_logged_model",
        "log_outputs",
        "log_artifact",
        "set_terminated",
        "update_run",
    )
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


def test_a_store_that_was_deleted_gets_everything_again_from_sync(
    root: Path, empty_store: Path
) -> None:
    folder = write_run(root)
    deliver(folder)
    before = everything(root)
    shutil.copy(empty_store, root / "mlflow.db")
    assert deliver(folder) == 0  # the next run's writer leaves it at that
    assert main([str(root)]) == 0
    assert everything(root) == before


def test_a_run_that_goes_on_is_whole_in_a_store_that_lost_its_beginning(
    root: Path, empty_store: Path
) -> None:
    folder = write_run(root, ended=False)
    deliver(folder)
    shutil.copy(empty_store, root / "mlflow.db")
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1", attempt=2)
    end(journal, [make_row("student")])
    journal.close()
    deliver(folder)
    _, runs = store(root)
    assert {name: run.info.status for name, run in runs.items()} == dict.fromkeys(
        ("run-1", *ARMS), "FINISHED"
    )
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


# -- statuses


def test_a_run_whose_process_went_without_a_word_is_killed_and_may_go_on(root: Path) -> None:
    folder = write_run(root, ended=False)
    journal = Journal(folder / "journal.jsonl")
    stage(journal, "control_steps")
    with FileLock(folder / ".lock"):  # it lives
        deliver(folder)
        statuses = {name: run.info.status for name, run in store(root)[1].items()}
        assert statuses == {
            "run-1": "RUNNING",
            "teacher": "FINISHED",
            "student": "FINISHED",
            "control_steps": "RUNNING",
        }
    assert main([str(root)]) == 0
    statuses = {name: run.info.status for name, run in store(root)[1].items()}
    assert statuses == {
        "run-1": "KILLED",
        "teacher": "FINISHED",
        "student": "FINISHED",
        "control_steps": "KILLED",
    }
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
    assert statuses == {
        "run-1": "FINISHED",
        "teacher": "FINISHED",
        "student": "FINISHED",
        "control_steps": "KILLED",
        "control_steps seed 0 attempt 2": "FINISHED",
    }


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "FINISHED"])
def test_a_stage_that_left_no_row_ends_with_its_run(root: Path, status: str) -> None:
    """Ctrl-C, SIGTERM or a crash may come between a stage's start and its window."""
    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, "run-1")
    rows = [
        make_unfinished("teacher", "FAILED", "diverged"),
        make_unfinished("control_steps", "SKIPPED", "no GPU"),
    ]
    for row in rows:
        journal.write("row", row=row)
    stage(journal, "student")
    end(journal, [make_row("teacher")], status, why="told")
    deliver(folder)
    _, runs = store(root)
    assert {name: run.info.status for name, run in runs.items()} == {
        "run-1": status,
        "teacher": "FAILED",
        "control_steps": "FINISHED",
        "student": "FAILED" if status == "FAILED" else "KILLED",
    }
    assert runs["control_steps"].data.tags["status"] == "SKIPPED"
    assert runs["teacher"].data.tags["why"] == "diverged"
    assert runs["run-1"].data.tags["why"] == "told"


# -- which store, which server


def test_the_environment_names_the_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    deliver(write_run(root / "elsewhere", uri="http://127.0.0.1:9"))
    assert "run-1" in store(root)[1]
    assert not (root / "elsewhere" / "mlflow.db").exists()


def test_where_a_run_went_is_noted_without_a_login(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert declared_uri(None) is None
    assert declared_uri("http://a:5000") == "http://a:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pw@b")
    assert declared_uri("http://a:5000") == "https://b"
    assert ui_command(tmp_path, "http://a:5000") == "open https://b"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert ui_command(tmp_path) == f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize("name", ["MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_the_environment_names_the_experiment(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.create_experiment("mine")
    monkeypatch.setenv(name, "mine" if name.endswith("NAME") else experiment)
    deliver(write_run(root))
    assert len(client.search_runs([experiment])) == 1 + len(ARMS)


def test_a_journal_that_has_not_begun_is_left_alone(root: Path) -> None:
    folder = root / "runs" / "run-1"
    folder.mkdir(parents=True)
    assert deliver(folder) == 0
    (folder / "journal.jsonl").write_text('{"e": "run_sta')
    assert deliver(folder) == 0
    assert not (folder / "mlflow.json").exists()


def test_servers_from_before_logged_models_get_tags(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert store_errors() == (MlflowException, ParseError, OSError, ImportError)


@pytest.mark.slow
def test_a_real_server_gets_what_a_file_gets(
    root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(root)
    other = root / "other"
    shutil.copytree(folder, other / "runs" / folder.name)
    shutil.copy(empty_store, other)
    deliver(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{other / 'mlflow.db'}",
        "--artifacts-destination",
        str(other / "a"),
    ]
    nothing = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=nothing, stderr=nothing, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while not _answers(port):
            assert time.monotonic() < deadline
            time.sleep(0.2)
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
