"""From a run's journal to MLflow: the only file that imports mlflow (it needs no more than mlflow-skinny).

Delivery is idempotent: runs are found again by tag before they are made, and metrics carry the journal's times, so
that delivering twice changes nothing. Nothing here runs inside the training process's step loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.ledger.journal import read_events
from pipeline.metrics import BY_KEY, row_summary
from pipeline.redact import redact_value
from pipeline.store import read_json, write_json

MAX_BATCH = 1000  # metrics of one log_batch; MLflow's own limit
MAX_PARAM, MAX_TAG, MAX_DESCRIPTION, MAX_DIGEST = 6000, 5000, 8000, 36  # characters; MLflow's limits
STATE = "mlflow.json"


def store_uri(root: Path, declared: str | None) -> str:
    """Return the tracking URI: MLFLOW_TRACKING_URI, else the declared one, else SQLite under `root`."""
    return os.environ.get("MLFLOW_TRACKING_URI") or declared or f"sqlite:///{root.resolve() / 'mlflow.db'}"


def ui_command(root: Path, declared: str | None = None) -> str:
    """Return the command that opens the MLflow UI on this store."""
    uri = store_uri(root, declared)
    return f"open {uri}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def deliver(run_dir: Path) -> int:
    """Deliver what MLflow has not had of a run; return the number of events delivered.

    Raises:
        mlflow.exceptions.MlflowException: If the store cannot be reached.
    """
    from filelock import FileLock

    with FileLock(run_dir / ".mlflow.lock"):  # a run's own writer and `pipeline.sync` may meet here
        nobody = _is_free(run_dir / ".lock")  # asked before reading: a run writes its end before it lets go
        events = read_events(run_dir / "journal.jsonl")
        state: dict[str, Any] = read_json(run_dir / STATE) or {"delivered": 0, "children": {}}
        fresh = events[state["delivered"] :]
        dead = nobody and bool(events) and events[-1]["e"] != "run_end"
        if not events or events[0]["e"] != "run_start" or not (fresh or (dead and not state.get("dead"))):
            return 0
        root = run_dir.parent.parent
        start = events[0]
        with FileLock(root / ".mlflow.lock"):  # several processes opening a fresh SQLite store race its migrations
            client, experiment = _open(root, start)
        parent = _run(client, experiment, start["run_id"], {"pipeline.run": start["run_id"]}, start["t"])
        for child, points in _points(fresh):
            _log_points(client, _child(client, experiment, parent, start, state, child), points)
        for event in fresh:
            _one(client, experiment, parent, start, state, event, run_dir)
        if dead:
            _mark_killed(client, [parent, *state["children"].values()], events[-1]["t"])
        write_json(run_dir / STATE, {**state, "delivered": len(events), "parent": parent, "dead": dead})
        return len(fresh)


def _is_free(lock: Path) -> bool:
    """Tell whether no process holds the lock of a run."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock).acquire(timeout=0):
            return True
    except Timeout:
        return False


def _mark_killed(client: Any, runs: list[str], at: float) -> None:
    for run in runs:
        if client.get_run(run).info.status == "RUNNING":
            client.set_terminated(run, status="KILLED", end_time=int(at * 1000))


def _open(root: Path, start: dict[str, Any]) -> tuple[Any, str]:
    from mlflow import MlflowClient

    uri = store_uri(root, start["tracking_uri"])
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or start["experiment"]
    found = client.get_experiment_by_name(name)
    if found is not None:
        return client, found.experiment_id
    where = (root / "artifacts").resolve().as_uri() if uri.startswith("sqlite") else None
    return client, client.create_experiment(name, artifact_location=where)


def _run(client: Any, experiment: str, name: str, tags: dict[str, str], at: float) -> str:
    """Return the MLflow run with these tags, made if there is none."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    found = client.search_runs([experiment], wanted, max_results=1)
    if found:
        return found[0].info.run_id
    made = client.create_run(experiment, start_time=int(at * 1000), tags={**tags, "mlflow.runName": name})
    return made.info.run_id


def _child_name(event: dict[str, Any]) -> str:
    attempt = f" attempt {event['attempt']}" if event["attempt"] > 1 else ""
    return f"{event['arm']} seed {event['seed']}{attempt}" if event["seed"] or attempt else event["arm"]


def _child(
    client: Any, experiment: str, parent: str, start: dict[str, Any], state: dict[str, Any], event: dict[str, Any]
) -> str:
    name = _child_name(event)
    if name not in state["children"]:
        tags = {"pipeline.run": f"{start['run_id']}/{name}", "mlflow.parentRunId": parent}
        state["children"][name] = _run(client, experiment, name, tags, event["t"])
    return state["children"][name]


def _points(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Group curve points by the child they belong to."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["e"] == "points":
            groups.setdefault(_child_name(event), []).append(event)
    yield from ((group[0], group) for group in groups.values())


def _log_points(client: Any, run: str, events: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    metrics = [
        Metric(f"train/{name}", value, int(event["t"] * 1000), event["step"])
        for event in events
        for name, value in event["values"].items()
        if value is not None
    ]
    for first in range(0, len(metrics), MAX_BATCH):
        client.log_batch(run, metrics=metrics[first : first + MAX_BATCH])


def _one(
    client: Any, experiment: str, parent: str, start: dict[str, Any], state: dict[str, Any], event: dict[str, Any],
    run_dir: Path,
) -> None:  # fmt: skip
    kind = event["e"]
    if kind == "run_start":
        client.update_run(parent, status="RUNNING")
        if event["attempt"] == 1:
            _log_settings(client, parent, event["params"])
            _log_datasets(client, parent, event["datasets"])
        for key, value in {**event["tags"], "question": event["question"], "recipe": event["recipe"]}.items():
            client.set_tag(parent, key, value[:MAX_TAG])
    elif kind == "stage_start":
        child = _child(client, experiment, parent, start, state, event)
        _log_settings(client, child, {**event["params"], "type": event["type"], "seed": event["seed"]})
    elif kind == "row":
        child = _child(client, experiment, parent, start, state, {**event["row"], "t": event["t"]})
        _log_row(client, child, event)
        _link_model(client, experiment, child, event["row"])
        state.setdefault("rows", {})[event["row"]["arm"]] = event["row"]
    elif kind == "serving":
        for row in event["rows"]:
            values = {f"serving/{name}": value for name, value in row["serving"].items() if f"serving/{name}" in BY_KEY}
            child = _child(client, experiment, parent, start, state, {**row, "t": event["t"]})
            _log_values(client, child, values, event["t"])
    elif kind == "comparisons":
        _log_values(client, parent, dict(_savings(event["comparisons"])), event["t"])
    elif kind == "run_end":
        _end(client, parent, state, event, run_dir)


def _log_settings(client: Any, run: str, settings: dict[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key, redact_value(key, str(value))[:MAX_PARAM]) for key, value in settings.items()]
    for first in range(0, len(params), 100):
        client.log_batch(run, params=params[first : first + 100])


def _log_datasets(client: Any, run: str, datasets: list[dict[str, Any]]) -> None:
    import json

    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(item["name"], item["digest"][:MAX_DIGEST], "local", json.dumps({"uri": item["name"]}),
                    profile=json.dumps({"num_documents": item["num_documents"]})),
            tags=[InputTag("mlflow.data.context", item["split"])],
        )
        for item in datasets
    ]  # fmt: skip
    client.log_inputs(run, datasets=inputs)


def _log_row(client: Any, run: str, event: dict[str, Any]) -> None:
    """Log a stage attempt: its figures, a tag for every null, its model's place and digest, its status."""
    row = event["row"]
    _log_values(client, run, row_summary(row), event["t"])
    tags = {"type": row["type"], "status": row["status"], "why": row["why"], "reused": row["reused"]}
    if row["artifact"] is not None:
        tags |= {"model.path": row["artifact"]["path"], "model.digest": row["artifact"]["digest"]}
    for key, value in tags.items():
        if value:
            client.set_tag(run, key, str(value)[:MAX_TAG])
    status = "FINISHED" if row["status"] == "SKIPPED" else row["status"]
    client.set_terminated(run, status=status, end_time=int(event["t"] * 1000))


def _link_model(client: Any, experiment: str, run: str, row: dict[str, Any]) -> None:
    """Show the artifact among MLflow's models, as an output of its run; the files stay where they are."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.exceptions import MlflowException

    if row["artifact"] is None:
        return
    digest = row["artifact"]["digest"]
    tags = {"mlflow.model.isExternal": "true", "path": row["artifact"]["path"], "digest": digest}
    try:
        if client.search_logged_models([experiment], filter_string=f"source_run_id = '{run}'"):
            return
        name = f"{row['arm']}-{digest[:8]}"
        model = client.create_logged_model(experiment, name=name, source_run_id=run, tags=tags, model_type=row["type"])
        client.finalize_logged_model(model.model_id, "READY")
        client.log_outputs(run, [LoggedModelOutput(model.model_id, 0)])
    except (MlflowException, NotImplementedError):  # a server from before logged models: the tags say it all
        client.set_tag(run, "model.linked", "no: this MLflow server has no logged models")


def _log_values(client: Any, run: str, values: dict[str, dict[str, Any]], at: float) -> None:
    from mlflow.entities import Metric, RunTag

    metrics = [Metric(key, value["v"], int(at * 1000), 0) for key, value in values.items() if value["v"] is not None]
    tags = [RunTag(f"null.{key}", value["why_null"][:MAX_TAG]) for key, value in values.items() if value["v"] is None]
    client.log_batch(run, metrics=metrics, tags=tags)


def _savings(comparisons: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for pair in comparisons:
        prefix = f"savings/{pair['arm']}_vs_{pair['base']}"
        for name in ("training", "serving", "payback"):
            if pair[name] is not None:
                yield f"{prefix}/{name}", pair[name]
        for key, value in pair["quality"].items():
            yield f"{prefix}/{key}", value


def _end(client: Any, parent: str, state: dict[str, Any], event: dict[str, Any], run_dir: Path) -> None:
    """End the parent: core keys of the primary arm, run totals, report, true status."""
    hours = event["run"]["device_hours"]
    values = {"compute/run_device_hours": hours["total"], "compute/run_spent_device_hours": event["run"]["spent"],
              "compute/run_reused_device_hours": event["run"]["reused"]}  # fmt: skip
    primary = state.get("rows", {}).get(event["primary_arm"])
    if primary is not None:
        core = {key: value for key, value in row_summary(primary).items() if BY_KEY[key].core}
        values |= {key: value for key, value in core.items() if value["v"] is not None}
    _log_values(client, parent, values, event["t"])
    client.set_tag(parent, "mlflow.note.content", event["description"][:MAX_DESCRIPTION])
    for name in event["files"]:
        if (run_dir / name).is_file():
            client.log_artifact(parent, str(run_dir / name))
    client.set_terminated(parent, status=event["status"], end_time=int(event["t"] * 1000))


def quiet() -> None:
    """Keep MLflow from blocking for minutes on a dead server, and from chattering."""
    import logging

    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")):
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.ERROR)
