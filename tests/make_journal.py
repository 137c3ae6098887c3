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
    params: dict[str, Any] | None = None,
    changed: list[str] | None = None,
    **tags: str,
) -> None:
    """Write a run's first line; without `changed`, as an older release did."""
    journal.write(
        "run_start",
        **({} if changed is None else {"changed": changed}),
        run_id=run_id,
        started_ns=0,
        attempt=attempt,
        recipe="distill",
        question="is it worth it?",
        experiment="distill",
        tracking_uri=uri,
        tags=tags,
        environment={"device": "NVIDIA H200", "mlflow.source.git.commit": None},
        params=params
        or {
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


def store(root: Path, uri: str | None = None) -> tuple[MlflowClient, dict[str, Any]]:
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    assert experiment is not None
    return client, {own_name(run): run for run in client.search_runs([experiment.experiment_id])}


def own_name(run: Any) -> str:
    """Return by what a run is found again: of a child, what tells it from its siblings."""
    parent, is_child, child = run.data.tags["pipeline.run"].partition("/")
    return child if is_child else parent


def everything(root: Path, uri: str | None = None) -> dict[str, Any]:
    """Return all that a store holds of the runs, ids of other runs left out."""
    client, runs = store(root, uri)
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
