"""Small journals as runs write them, and what MLflow holds after their delivery.

`write_run(root)` leaves a whole run; `start`, `stage`, `end` its parts; `everything(root)` the
store's content.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from make_result import make_pairs, make_row, make_run
from mlflow import MlflowClient

from pipeline.ledger.journal import Journal

ARMS = ("teacher", "student")


def start(
    journal: Journal,
    run_id: str,
    *,
    attempt: int = 1,
    uri: str | None = None,
    mlflow: bool = True,
    **tags: str,
) -> None:
    journal.write(
        "run_start",
        run_id=run_id,
        started_ns=0,
        attempt=attempt,
        recipe="distill",
        question="is it worth it?",
        experiment="distill",
        tracking_uri=uri,
        tags=tags,
        environment={"device": "NVIDIA H200", "mlflow.source.git.commit": None},
        params={
            "training.steps": 4,
            "hub.api_key": "hunter2",
            "student.config.odd_key*": 1,
            "tracking.mlflow": mlflow,
        },
        datasets=[{"name": "d", "digest": "a" * 60, "split": "test", "num_documents": 3}],
    )


TRACE = "traces/student-seed0/step-000011.json.gz"


def stage(journal: Journal, arm: str, *, attempt: int = 1) -> None:
    journal.write(
        "stage_start",
        arm=arm,
        stage=arm,
        type="train",
        seed=0,
        attempt=attempt,
        params={"steps": 4},
        depends_on=[],
    )
    for step in (1, 2):
        journal.write(
            "points", arm=arm, seed=0, attempt=attempt, step=step, values={"loss": 3.0 - step}
        )


def end(
    journal: Journal, rows: list[dict[str, Any]], status: str = "FINISHED", why: str | None = None
) -> None:
    journal.write("comparisons", comparisons=make_pairs("distill")[:1])
    journal.write(
        "run_end",
        status=status,
        why=why,
        primary_arm="student",
        run=make_run(rows),
        description="x" * 9000,
        files=["report.md", TRACE],
    )


def write_run(
    root: Path,
    run_id: str = "run-1",
    *,
    uri: str | None = None,
    ended: bool = True,
    mlflow: bool = True,
    rows: list[dict[str, Any]] | None = None,
) -> Path:
    folder = root / "runs" / run_id
    folder.mkdir(parents=True)
    (folder / "report.md").write_text("# report")
    (folder / TRACE).parent.mkdir(parents=True)
    (folder / TRACE).write_bytes(b"a trace")
    journal = Journal(folder / "journal.jsonl")
    start(journal, run_id, uri=uri, mlflow=mlflow, team="vision")
    rows = [make_row(arm) for arm in ARMS] if rows is None else rows
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
    return client, {
        run.info.run_name: run for run in client.search_runs([experiment.experiment_id])
    }


def everything(root: Path) -> dict[str, Any]:
    """Return all that a store holds of the runs, ids of other runs left out."""
    client, runs = store(root)
    return {
        name: (
            run.info.status,
            run.info.start_time,
            run.info.end_time,
            run.data.params,
            {key: value for key, value in run.data.tags.items() if key != "mlflow.parentRunId"},
            {
                key: [
                    (point.step, point.timestamp, point.value)
                    for point in client.get_metric_history(run.info.run_id, key)
                ]
                for key in run.data.metrics
            },
            len(run.inputs.dataset_inputs),
            len(run.outputs.model_outputs),
        )
        for name, run in runs.items()
    }
