"""A period's GPU time on one page, from real MLflow stores that journals were delivered to; every
figure worked by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from make_result import make_run
from mlflow import MlflowClient
from test_chargeback import NOON, a_row

from pipeline.ledger.journal import Journal
from pipeline.ledger.metrics import BY_KEY
from pipeline.tracking.deliver import deliver

HOUR_NS = 3600e9


def write_run(
    root: Path,
    run_id: str,
    rows: list[dict[str, Any]],
    *,
    at: float = NOON,
    status: str = "FINISHED",
    forecast: dict[str, Any] | None = None,
    outside: dict[str, dict[str, int]] | None = None,
) -> Path:
    """Write and deliver a run: a row a minute up to `at`, where it ends."""
    folder = root / "runs" / run_id
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    began = at - 60.0 * (len(rows) + 1)
    journal.write(
        "run_start",
        run_id=run_id,
        started_ns=0,
        attempt=1,
        recipe="distill",
        question="?",
        experiment="distill",
        tracking_uri=None,
        tags={"team": "vision"},
        environment={"device": "NVIDIA H200"},
        datasets=[],
        params={"model.name": "m1"},
        t=began,
        mono_ns=0,
    )
    for index, row in enumerate(rows, 1):
        journal.write("row", row=row, t=began + 60.0 * index, mono_ns=index)
    run = make_run(rows)
    run |= {} if outside is None else {"phases_device_ns": outside}
    journal.write(
        "run_end",
        status=status,
        why=None,
        primary_arm="student",
        run=run,
        description="",
        files=[],
        **({} if forecast is None else {"forecast": forecast}),
        t=at,
        mono_ns=len(rows) + 1,
    )
    journal.close()
    deliver(folder)
    return folder


def foreseen(
    value: float | None, low: float = 0.0, high: float = 0.0, actual: float | None = None
) -> dict[str, Any]:
    """Return the hours of a forecast as a run's last line has them."""
    if value is None:
        return {"expected": None, "why_missing": "nothing like it was done here", "actual": None}
    expected = {"value": value, "low": low, "high": high}
    return {"expected": expected, "why_missing": None, "actual": actual}


def parent(root: Path, run_id: str) -> Any:
    """Return what MLflow holds of a run."""
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    (found,) = client.search_runs(["1"], f"tags.`pipeline.run` = '{run_id}'")
    return found.data


# -- what MLflow is told --------------------------------------------------------------------------


def test_the_causes_of_what_is_wasted_outside_of_stages_reach_mlflow(root: Path) -> None:
    """Import 0.5 h and waiting for others 0.25 h around the stages, 0.1 h of it in the comparison
    pass; generating is no waste.
    """
    outside = {
        "overhead": {"import": round(0.5 * HOUR_NS), "idle_rank": round(0.15 * HOUR_NS)},
        "compare": {"idle_rank": round(0.1 * HOUR_NS), "generate": round(2 * HOUR_NS)},
    }
    write_run(root, "run-1", [a_row()], outside=outside)
    told = {
        key.removeprefix("compute/run_wasted_").removesuffix("_device_hours"): hours
        for key, hours in parent(root, "run-1").metrics.items()
        if key.startswith("compute/run_wasted_")
    }
    assert told == pytest.approx(
        {"import": 0.5, "idle_rank": 0.25, "data_wait": 0, "comm_exposed": 0, "unattributed": 0}
    )


def test_a_forecast_and_what_it_came_to_reach_mlflow(root: Path) -> None:
    write_run(root, "run-1", [a_row()], forecast=foreseen(0.5, 0.4, 0.65, 0.55))
    write_run(root, "run-2", [a_row()], forecast=foreseen(0.5, 0.4, 0.65), status="FAILED")
    write_run(root, "run-3", [a_row()], forecast=foreseen(None))
    write_run(root, "run-4", [a_row()])
    held = {
        run: {k: v for k, v in parent(root, run).metrics.items() if k.startswith("forecast/")}
        for run in ("run-1", "run-2", "run-3", "run-4")
    }
    key = "forecast/device_hours"
    expected = {key: 0.5, f"{key}_low": 0.4, f"{key}_high": 0.65}
    assert held == {
        "run-1": {**expected, "forecast/actual_device_hours": 0.55},
        "run-2": expected,
        "run-3": {},
        "run-4": {},
    }
    assert set(held["run-1"]) <= set(BY_KEY)
    nulls = {run: parent(root, run).tags for run in ("run-2", "run-3", "run-4")}
    why = "the run did not finish, or took a part over"
    assert nulls["run-2"]["null.forecast/actual_device_hours"] == why
    assert nulls["run-3"][f"null.{key}"] == "nothing like it was done here"
    assert not [name for name in nulls["run-4"] if "forecast" in name]
