"""What MLflow's UI is given to show: names, few parameters, seeds, models, an experiment in
training mode with saved views.
"""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from make_journal import start, store, write_run
from make_result import make_row, value
from mlflow import MlflowClient

from pipeline.ledger.journal import Journal
from pipeline.runs.changed import changed
from pipeline.tracking.deliver import deliver, view_address
from pipeline.tracking.views import ARMS, CORE, WRITTEN

ALL = {
    "primary_arm": "student",
    "training.steps": 4,
    "quality.margin": 0.01,
    "policy.alpha": 0.05,
    "cost.currency": None,
    "question": "q",
}


def _run(root: Path, params: dict[str, Any], changed: list[str]) -> Any:
    """Deliver a run without stages; return its parent."""
    folder = root / "runs" / "20261130-120000-distill-3f2a"
    folder.mkdir(parents=True)
    journal = Journal(folder / "journal.jsonl")
    start(journal, folder.name, params=params, changed=changed)
    journal.close()
    deliver(folder)
    return store(root)[1][folder.name]


def test_names_say_recipe_arm_and_seed(root: Path) -> None:
    rows = [make_row("teacher"), make_row("student"), make_row("student")]
    rows[2] |= {"seed": 1, "attempt": 2}
    folder = write_run(root, "20261130-120000-distill-3f2a", rows=rows)
    deliver(folder)
    _, runs = store(root)
    assert {name: run.info.run_name for name, run in runs.items()} == {
        "20261130-120000-distill-3f2a": "distill 3f2a",  # an older release's: no arm is told
        "teacher": "distill/teacher s0",
        "student": "distill/student s0",
        "student seed 1 attempt 2": "distill/student s1 attempt 2",
    }
    tags = runs["student"].data.tags
    assert (tags["run"], tags["arm"]) == ("3f2a", "student")
    assert tags["quality_key"] == "bits_per_byte"


def test_a_parent_shows_what_differs_from_the_defaults(root: Path) -> None:
    parent = _run(root, ALL, ["primary_arm", "training.steps", "question"])
    assert parent.info.run_name == "distill/student 3f2a"
    assert parent.data.params == {"training.steps": "4", "quality.margin": "0.01"}
    assert parent.data.tags["changed"] == "training.steps=4"
    assert parent.data.tags["question"]


def test_a_gate_s_parent_shows_its_policy(root: Path) -> None:
    """`python -m pipeline history` reads it from there."""
    params = _run(root, {**ALL, "candidate": "latest"}, ["candidate"]).data.params
    assert params == {"candidate": "latest", "quality.margin": "0.01", "policy.alpha": "0.05"}


def test_a_setting_at_its_default_s_value_does_not_differ() -> None:
    from pipeline.config.settings.run import Run
    from pipeline.config.settings.training import TrainingConfig

    steps = TrainingConfig().steps + 1
    run = Run(training=TrainingConfig(steps=steps, batch_size=TrainingConfig().batch_size))
    assert changed(run) == ["training.steps"]
    assert changed(Run()) == []


def test_seeds_are_shown_with_mean_and_spread(root: Path) -> None:
    """Against Python's own statistics: an arm's figures, and those of the primary arm."""
    quality, hours = {0: 2.0, 1: 2.5, 2: 3.5}, {0: 0.25, 1: 0.5, 2: 1.5}
    rows = [make_row("teacher")]
    for seed in quality:
        row = make_row("student")
        row["seed"] = seed
        row["quality"]["bits_per_byte"] |= {"value": quality[seed]}
        row["ledger"]["device_hours"]["attached"] = value(hours[seed])
        rows.append(row)
    deliver(write_run(root, rows=rows))
    metrics = store(root)[1]["run-1"].data.metrics
    seconds = [each * 3600 for each in hours.values()]
    assert metrics["quality/primary"] == pytest.approx(mean(quality.values()))
    assert metrics["quality/primary_sd"] == pytest.approx(stdev(quality.values()))
    assert metrics["compute/device_seconds"] == pytest.approx(mean(seconds))
    assert metrics["compute/device_seconds_sd"] == pytest.approx(stdev(seconds))
    assert metrics["quality/arms/student_sd"] == metrics["quality/primary_sd"]
    assert metrics["compute/arms/student"] == metrics["compute/device_seconds"]
    assert metrics["quality/arms/teacher"] == rows[0]["quality"]["bits_per_byte"]["value"]
    assert "quality/arms/teacher_sd" not in metrics  # one seed has no spread


def test_models_have_figures_with_the_split_they_were_read_on(root: Path) -> None:
    rows = [make_row(arm) for arm in ("teacher", "student")]
    deliver(write_run(root, rows=rows))
    client, runs = store(root)
    child, parent = runs["student"], runs["run-1"]
    (output,) = child.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    figures = {each.key: each for each in model.metrics}
    assert figures["quality/primary"].value == child.data.metrics["quality/primary"]
    (split,) = child.inputs.dataset_inputs
    for each in figures.values():
        assert (each.dataset_name, each.dataset_digest) == (split.dataset.name, "a" * 36)
    assert split.dataset.name == "d test"
    assert {"quality/primary", "compute/device_hours", "compute/device_seconds"} <= set(figures)
    assert "compute/wasted_data_wait_device_hours" not in figures  # of the run, not of the model
    assert [each.model_id for each in parent.outputs.model_outputs] == [output.model_id]


# -- the experiment -------------------------------------------------------------------------------


def _experiment(root: Path) -> tuple[MlflowClient, Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    return client, client.get_experiment_by_name("distill")


def _view(tags: dict[str, str], name: str) -> dict[str, Any]:
    saved = json.loads(tags[f"mlflow.sharedViewState.{name}"])
    packed = saved["state"].removeprefix("deflate;")
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def test_an_experiment_is_set_up_for_training_with_its_views(root: Path) -> None:
    folder = write_run(root)
    deliver(folder)
    _, found = _experiment(root)
    assert found.tags["mlflow.experimentKind"] == "custom_model_development"
    assert found.tags["mlflow.experiment.primaryMetric.name"] == "quality/primary"
    for view in (CORE, ARMS):
        address = f"#/experiments/{found.experiment_id}/runs?workflowType=machine_learning"
        assert f"{address}&viewStateShareKey={view}" in found.tags["mlflow.note.content"]
        state = _view(found.tags, view)
        assert state["selectedColumns"][0] == "metrics.`quality/primary`"
        sections = {each["uuid"] for each in state["compareRunSections"]}
        assert {each["metricSectionId"] for each in state["compareRunCharts"]} <= sections
    metrics = store(root)[1]["student"].data.metrics
    parallel = _view(found.tags, CORE)["compareRunCharts"][-1]
    assert set(parallel["selectedMetrics"]) <= set(metrics)
    assert view_address(folder) == (
        f"http://127.0.0.1:5000/#/experiments/{found.experiment_id}/runs"
        "?workflowType=machine_learning&viewStateShareKey=pipeline"
    )


def test_what_people_change_in_the_ui_stays(root: Path) -> None:
    deliver(write_run(root))
    client, found = _experiment(root)
    key = f"mlflow.sharedViewState.{ARMS}"
    client.delete_experiment_tag(found.experiment_id, key)
    client.set_experiment_tag(found.experiment_id, "mlflow.note.content", "ours")
    deliver(write_run(root, "run-2"))
    tags = _experiment(root)[1].tags
    assert (key in tags, tags["mlflow.note.content"]) == (False, "ours")


def test_an_experiment_of_others_keeps_its_kind_and_description(root: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    theirs = {"mlflow.experimentKind": "genai_development", "mlflow.note.content": "theirs"}
    client.create_experiment("distill", (root / "a").as_uri(), tags=theirs)
    deliver(write_run(root))
    tags = _experiment(root)[1].tags
    assert {name: tags[name] for name in theirs} == theirs
    assert tags[WRITTEN]


def test_the_closing_line_names_the_view(tmp_path: Path) -> None:
    """Of a server its address, of a file that where `mlflow ui` serves; unknown before delivery."""
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    assert view_address(folder) is None
    given = {"offset": 0, "last": None, "experiment": "3"}
    (folder / "mlflow.json").write_text(json.dumps(given))
    address = view_address(folder, "https://user:secret@mlflow.example/")
    assert address is not None
    assert address.startswith("https://mlflow.example/#/experiments/3/runs?")
