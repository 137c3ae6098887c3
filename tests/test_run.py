"""The whole product at toy size, as a user runs it: result, ledger, reuse, MLflow, exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import run, start
from here import here, result_in
from make_assess_models import saved, tiny
from make_journal import own_name
from reports import whole_report

from pipeline.ledger.metrics import BY_KEY
from pipeline.tasks.table import Task

TINY = [
    "tracking.charts=false",
    *(
        "training.steps=4",
        "training.batch_size=4",
        "training.sequence_length=64",
        "data.max_documents=40",
    ),
    *(
        "model.shape.hidden_size=64",
        "model.shape.heads=1",
        "model.shape.intermediate_size=128",
        "model.shape.layers=2",
    ),
    "training.eval_documents=1",
    *("quality.max_documents=24", "quality.bootstrap=200"),
    *("serving.blocks=2", "serving.load.new=4", "serving.batches=[1]"),
]


# Of a teacher of four steps, read on one document, nothing is to be learnt.
DISTILL = [
    "recipe=distill",
    "stages.teacher.steps=4",
    "stages.student.allow_weak_teacher=true",
    *TINY,
]


@pytest.fixture(scope="module")
def distilled(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> tuple[Path, dict, str]:
    cwd = tmp_path_factory.mktemp("distill")
    (cwd / "mlruns").mkdir()
    shutil.copy(empty_store, cwd / "mlruns/mlflow.db")
    done = run(cwd, *DISTILL, "cost.converged_at=100")
    assert done.returncode == 0, done.stderr
    return cwd, result_in(cwd), done.stdout


def test_all_arms_are_made_and_the_ledger_closes(distilled) -> None:
    _, result, printed = distilled
    assert [row["arm"] for row in result["rows"]] == [
        "teacher",
        "student",
        "control_steps",
        "control_compute",
    ]
    for row in result["rows"]:
        ledger = row["ledger"]
        hours = {
            name: value["value"]
            for name, value in ledger["device_hours"].items()
            if name != "wasted_by"
        }
        assert row["status"] == "FINISHED"
        assert ledger["meter_valid"], ledger["meter_problems"]
        assert sum(ledger["phases_ns"].values()) == pytest.approx(
            ledger["wall_s"]["value"] * 1e9, abs=1
        )
        assert hours["attached"] == pytest.approx(
            hours["productive"] + hours["support"] + hours["wasted"]
        )
        assert hours["attached"] == pytest.approx(hours["work"] + hours["assess"] + hours["retry"])
        assert ledger["gpu_hours"]["attached"]["why_missing"] == "a CPU run uses no GPU"
        assert Path(row["artifact"]["path"], "model.safetensors").is_file()
    parts = {name: value["value"] for name, value in result["run"]["device_hours"].items()}
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert parts["overhead"] > 0
    for text in (result["conclusion"]["verdict"], *result["conclusion"]["answers"]):
        assert text in " ".join(printed.split())
    assert max(map(len, printed.partition("bits/byte")[0].splitlines())) <= 80


def test_the_control_gets_the_students_flops_and_not_more(distilled) -> None:
    _, result, _ = distilled
    flops = {row["arm"]: row["ledger"]["counts"]["model_flops"]["value"] for row in result["rows"]}
    steps = {row["arm"]: row["ledger"]["counts"]["steps"]["value"] for row in result["rows"]}
    per_step = flops["control_compute"] / steps["control_compute"]
    assert 0 <= flops["student"] - flops["control_compute"] < per_step
    assert steps["control_steps"] == steps["student"] == 4
    assert result["rows"][1]["ledger"]["counts"]["distillation_share"]["value"] > 0


def _has_the_figures_of(metrics: dict[str, float], row: dict[str, Any]) -> None:
    """Compare what MLflow shows of a stage attempt with its row of result.json, both ways."""
    hours = row["ledger"]["device_hours"]
    told = {
        "compute/device_hours": hours["attached"],
        "compute/wall_s": row["ledger"]["wall_s"],
        **{f"compute/{name}_device_hours": hours[name] for name in ("work", "assess", "retry")},
        **{
            f"{group}/{key}": row[group][key]
            for group in ("quality", "serving")
            for key in row[group]
        },
    }
    for key, figure in told.items():
        if isinstance(figure, dict) and "value" in figure and key in BY_KEY:
            assert metrics.get(key) == figure["value"], key
    assert metrics["compute/device_seconds"] == hours["attached"]["value"] * 3600
    shown = {key for key in metrics if key.startswith(("quality/", "serving/"))}
    assert shown <= {*told, "quality/primary"}


def test_mlflow_has_parent_and_children_with_true_figures(distilled) -> None:
    from mlflow import MlflowClient

    cwd, result, _ = distilled
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    runs = {own_name(run): run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(result["run_id"])
    assert set(runs) == {"teacher", "student", "control_steps", "control_compute"}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    student = next(row for row in result["rows"] if row["arm"] == "student")
    for each in (parent, runs["student"]):
        assert each.data.metrics["quality/primary"] == student["quality"]["bits_per_byte"]["value"]
        assert (
            each.data.metrics["compute/device_hours"]
            == student["ledger"]["device_hours"]["attached"]["value"]
        )
    assert parent.info.run_name == f"distill/student {result['run_id'][-4:]}"
    assert runs["student"].info.run_name == "distill/student s0"
    for row in result["rows"]:
        _has_the_figures_of(runs[row["arm"]].data.metrics, row)
    total = result["run"]["device_hours"]["total"]["value"]
    assert parent.data.metrics["compute/run_device_hours"] == total
    assert parent.data.metrics["compute/run_device_seconds"] == total * 3600
    assert runs["student"].data.tags["null.compute/gpu_hours"] == "a CPU run uses no GPU"
    assert len(client.get_metric_history(runs["student"].info.run_id, "train/loss")) == 4
    assert {item.dataset.digest for item in parent.inputs.dataset_inputs} == {
        result["environment"]["data_digest"]
    }
    command = [sys.executable, "-m", "pipeline", "sync", str(cwd / "mlruns")]
    again = subprocess.run(command, capture_output=True, text=True)
    assert "0 events delivered" in again.stdout, again.stderr


def test_a_model_has_cost_what_there_was_until_its_first_artifact_at_the_declared_quality(
    distilled,
) -> None:
    from mlflow import MlflowClient

    cwd, result, printed = distilled
    told, teacher = (
        result["run"]["per_converged_model"],
        result["rows"][0]["ledger"]["device_hours"]["attached"]["value"],
    )
    # any model has fewer than 100 bits a byte
    until_then = result["run"]["device_hours"]["overhead"]["value"] + teacher
    assert told["device_hours"]["value"] == pytest.approx(until_then)
    assert (told["run"], told["amount"]["value"]) == (result["run_id"], None)
    assert "until its model converged: " in printed
    assert "Until its model converged: " in whole_report(cwd / "mlruns/latest")
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    (run,) = client.search_runs(
        [experiment.experiment_id], f"tags.`pipeline.run` = '{result['run_id']}'"
    )
    assert (
        run.data.metrics["compute/per_converged_model_device_hours"]
        == told["device_hours"]["value"]
    )
    assert run.data.tags["null.cost/per_converged_model"] == told["amount"]["why_missing"]


def test_the_same_command_again_reuses_and_a_changed_setting_reruns_what_depends_on_it(
    distilled,
) -> None:
    cwd, first, _ = distilled
    assert here(cwd, *DISTILL, "tracking.mlflow=false").returncode == 0
    second = result_in(cwd)
    assert second["run_id"] != first["run_id"]
    assert {row["reused"] for row in second["rows"]} == {first["run_id"]}
    assert second["run"]["device_hours"]["work"]["value"] == 0
    spent = {part: value["value"] for part, value in first["run"]["device_hours"].items()}
    assert second["run"]["reused"]["value"] == pytest.approx(
        spent["work"] + spent["assess"] + spent["compare"]
    )
    assert second["comparisons"] == first["comparisons"]
    assert (
        here(
            cwd,
            *DISTILL,
            "stages.student.temperature=2",
            "student.layers=1",  # another way to say what every_2 says
            "tracking.mlflow=false",
        ).returncode
        == 0
    )
    third = {row["arm"]: row["reused"] for row in result_in(cwd)["rows"]}
    assert third == {
        "teacher": first["run_id"],
        "student": None,
        "control_steps": first["run_id"],
        "control_compute": first["run_id"],
    }


@pytest.mark.faults
def test_a_terminated_run_leaves_a_checkpoint_exits_75_and_goes_on(tmp_path: Path) -> None:
    args = [*TINY, "training.steps=200", "training.checkpoint_every=5", "tracking.mlflow=false"]
    process = start(tmp_path, "recipe=baseline", *args)
    deadline = time.monotonic() + 120
    while (
        not list(tmp_path.glob("mlruns/store/checkpoints/*/step-*")) and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command resumes from there" in said
    assert here(tmp_path, "recipe=baseline", *args).returncode == 0
    result = result_in(tmp_path)
    assert result["run"]["attempts"] == 2
    assert result["rows"][-1]["ledger"]["counts"]["steps"]["value"] == 200
    assert len(list(tmp_path.glob("mlruns/runs/*/result.json"))) == 1


@pytest.mark.slow
def test_labels_that_mean_nothing_stay_at_chance_and_real_ones_do_not(tmp_path: Path) -> None:
    args = [
        *TINY,
        "data=stdlib_labels",
        "training.steps=150",
        "training.learning_rate=3e-3",
        "training.batch_size=16",
        "data.max_documents=600",
        "quality.max_documents=400",
        "tracking.mlflow=false",
    ]
    accuracy = {}
    for shuffled in ("false", "true"):
        done = here(tmp_path, "recipe=baseline", *args, f"data.shuffle_labels={shuffled}")
        assert done.returncode == 0, done.stderr
        quality = result_in(tmp_path)["rows"][0]["quality"]["accuracy"]
        accuracy[shuffled] = quality["value"]
    labels = [json.loads(line)["label"] for line in Path(quality["items"]).read_text().splitlines()]
    # always naming the largest class
    chance = max(labels.count(label) for label in labels) / len(labels)
    assert accuracy["true"] < chance + 0.05
    assert accuracy["false"] > chance + 0.1


WATCHES_IMPORTS = """
import sys, time
started = time.monotonic_ns()
from pipeline.ledger import phases

clocks, made = [], phases.PhaseClock.__init__

def make(self, *args, **more):
    made(self, *args, **more)
    clocks.append(self)

phases.PhaseClock.__init__ = make

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("transformers", "transformers.models.auto.configuration_auto"):
            print("while", clocks[0]._stack[-1] if clocks else "no clock", "importing", name)

sys.meta_path.insert(0, Watch())
from pipeline.cli import main as cli
sys.exit(cli.main(sys.argv[1:], started_ns=started))
"""


@pytest.mark.slow
def test_what_reads_a_given_model_is_imported_as_import(tmp_path: Path) -> None:
    """A third of a short run was nobody's time."""
    saved(tiny(Task.causal_lm), tmp_path / "model")
    given = [word for word in TINY if not word.startswith("model.")]
    command = [
        sys.executable,
        "-c",
        WATCHES_IMPORTS,
        "recipe=baseline",
        f"model.path={tmp_path / 'model'}",
        *given,
        "tracking=off",
    ]
    # a fresh process: it imports
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("while ")]
    assert {line[3] for line in said} >= {
        "transformers",
        "transformers.models.auto.configuration_auto",
    }
    assert {line[1] for line in said} == {"import"}, said
