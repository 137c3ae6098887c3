"""The whole product at toy size, as a user runs it: result, ledger, reuse, MLflow, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from mlflow import MlflowClient

from pipeline.schema import RESULT_SCHEMA

TINY = [
    *("training.steps=4", "training.batch_size=4", "training.sequence_length=64", "data.max_documents=40"),
    *("model.shape.hidden_size=64", "model.shape.heads=1", "model.shape.intermediate_size=128", "model.shape.layers=2"),
    *("quality.max_documents=24", "quality.bootstrap=200"),
    *("serving.blocks=2", "serving.load.new=4", "serving.batches=[1]"),
]


def pipeline(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *args], cwd=cwd, capture_output=True, text=True, timeout=300
    )


def result_in(cwd: Path) -> dict:
    result = json.loads((cwd / "mlruns/latest/result.json").read_text())
    jsonschema.validate(result, RESULT_SCHEMA)
    return result


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, str]:
    cwd = tmp_path_factory.mktemp("distill")
    done = pipeline(cwd, "recipe=distill", "stages.teacher.steps=4", *TINY, "cost.converged_at=100")
    assert done.returncode == 0, done.stderr
    return cwd, result_in(cwd), done.stdout


def test_all_arms_are_made_and_the_ledger_closes(distilled) -> None:
    _, result, printed = distilled
    assert [row["arm"] for row in result["rows"]] == ["teacher", "student", "control_steps", "control_compute"]
    for row in result["rows"]:
        ledger = row["ledger"]
        hours = {name: value["v"] for name, value in ledger["device_hours"].items() if name != "wasted_by"}
        assert row["status"] == "FINISHED"
        assert ledger["meter_valid"], ledger["meter_problems"]
        assert sum(ledger["phases_ns"].values()) == pytest.approx(ledger["wall_s"]["v"] * 1e9, abs=1)
        assert hours["attached"] == pytest.approx(hours["productive"] + hours["support"] + hours["wasted"])
        assert hours["attached"] == pytest.approx(hours["work"] + hours["assess"] + hours["retry"])
        assert ledger["gpu_hours"]["attached"]["why_null"] == "a CPU run uses no GPU"
        assert Path(row["artifact"]["path"], "model.safetensors").is_file()
    parts = {name: value["v"] for name, value in result["run"]["device_hours"].items()}
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert parts["overhead"] > 0
    assert result["conclusion"] in " ".join(printed.split())
    assert max(map(len, printed.partition("bits/byte")[0].splitlines())) <= 80


def test_the_control_gets_the_students_flops_and_not_more(distilled) -> None:
    _, result, _ = distilled
    flops = {row["arm"]: row["ledger"]["counts"]["model_flops"]["v"] for row in result["rows"]}
    steps = {row["arm"]: row["ledger"]["counts"]["steps"]["v"] for row in result["rows"]}
    per_step = flops["control_compute"] / steps["control_compute"]
    assert 0 <= flops["student"] - flops["control_compute"] < per_step
    assert steps["control_steps"] == steps["student"] == 4
    assert result["rows"][1]["ledger"]["counts"]["distillation_share"]["v"] > 0


def test_mlflow_has_parent_and_children_with_true_figures(distilled) -> None:
    from mlflow import MlflowClient

    cwd, result, _ = distilled
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(result["run_id"])
    assert set(runs) == {"teacher", "student", "control_steps", "control_compute"}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    student = next(row for row in result["rows"] if row["arm"] == "student")
    for run in (parent, runs["student"]):
        assert run.data.metrics["quality/primary"] == student["quality"]["bits_per_byte"]["v"]
        assert run.data.metrics["compute/device_hours"] == student["ledger"]["device_hours"]["attached"]["v"]
    assert runs["student"].data.tags["null.compute/gpu_hours"] == "a CPU run uses no GPU"
    assert len(client.get_metric_history(runs["student"].info.run_id, "train/loss")) == 4
    assert {item.dataset.digest for item in parent.inputs.dataset_inputs} == {result["environment"]["data_digest"]}
    again = subprocess.run([sys.executable, "-m", "pipeline.sync", str(cwd / "mlruns")], capture_output=True, text=True)
    assert "0 events delivered" in again.stdout, again.stderr


def test_a_model_has_cost_what_there_was_until_its_first_artifact_at_the_declared_quality(distilled) -> None:
    from mlflow import MlflowClient

    cwd, result, printed = distilled
    told, teacher = result["run"]["per_converged_model"], result["rows"][0]["ledger"]["device_hours"]["attached"]["v"]
    until_then = result["run"]["device_hours"]["overhead"]["v"] + teacher  # any model has fewer than 100 bits a byte
    assert told["device_hours"]["v"] == pytest.approx(until_then)
    assert (told["run"], told["amount"]["v"]) == (result["run_id"], None)
    assert "until its model converged: " in printed
    assert "Until its model converged: " in (cwd / "mlruns/latest/report.md").read_text()
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd / 'mlruns/mlflow.db'}")
    experiment = client.get_experiment_by_name("distill")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`pipeline.run` = '{result['run_id']}'")
    assert run.data.metrics["compute/per_converged_model_device_hours"] == told["device_hours"]["v"]
    assert run.data.tags["null.cost/per_converged_model"] == told["amount"]["why_null"]


def test_the_same_command_again_reuses_and_a_changed_setting_reruns_what_depends_on_it(distilled) -> None:
    cwd, first, _ = distilled
    assert pipeline(cwd, "recipe=distill", "stages.teacher.steps=4", *TINY, "tracking.mlflow=false").returncode == 0
    second = result_in(cwd)
    assert second["run_id"] != first["run_id"]
    assert {row["reused"] for row in second["rows"]} == {first["run_id"]}
    assert second["run"]["device_hours"]["work"]["v"] == 0
    spent = {part: value["v"] for part, value in first["run"]["device_hours"].items()}
    assert second["run"]["reused"]["v"] == pytest.approx(spent["work"] + spent["assess"] + spent["compare"])
    assert second["comparisons"] == first["comparisons"]
    assert (
        pipeline(
            cwd,
            "recipe=distill",
            "stages.teacher.steps=4",
            *TINY,
            "stages.student.temperature=2",
            "student.layers=1",  # another way to say what every_2 says
            "tracking.mlflow=false",
        ).returncode
        == 0
    )
    third = {row["arm"]: row["reused"] for row in result_in(cwd)["rows"]}
    assert third == {
        "teacher": first["run_id"], "student": None, "control_steps": first["run_id"],
        "control_compute": first["run_id"],
    }  # fmt: skip


@pytest.mark.faults
def test_a_terminated_run_leaves_a_checkpoint_exits_75_and_goes_on(tmp_path: Path) -> None:
    args = [*TINY, "training.steps=400", "training.checkpoint_every=5", "tracking.mlflow=false"]
    command = [sys.executable, "-m", "pipeline", "recipe=baseline", *args]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("mlruns/store/checkpoints/*/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on from there" in said
    assert pipeline(tmp_path, "recipe=baseline", *args).returncode == 0
    result = result_in(tmp_path)
    assert result["run"]["attempts"] == 2
    assert result["rows"][-1]["ledger"]["counts"]["steps"]["v"] == 400
    assert len(list(tmp_path.glob("mlruns/runs/*/result.json"))) == 1


def test_labels_that_mean_nothing_stay_at_chance_and_real_ones_do_not(tmp_path: Path) -> None:
    args = [*TINY, "data=stdlib_labels", "training.steps=300", "training.batch_size=16", "data.max_documents=600",
            "quality.max_documents=400", "tracking.mlflow=false"]  # fmt: skip
    accuracy = {}
    for shuffled in ("false", "true"):
        done = pipeline(tmp_path, "recipe=baseline", *args, f"data.shuffle_labels={shuffled}")
        assert done.returncode == 0, done.stderr
        quality = result_in(tmp_path)["rows"][0]["quality"]["accuracy"]
        accuracy[shuffled] = quality["v"]
    labels = [json.loads(line)["label"] for line in Path(quality["items"]).read_text().splitlines()]
    chance = max(labels.count(label) for label in labels) / len(labels)  # always naming the largest class
    assert accuracy["true"] < chance + 0.05
    assert accuracy["false"] > chance + 0.1


def test_a_format_that_saves_neither_time_nor_memory_ends_the_run_with_3(tmp_path: Path) -> None:
    """One small matrix of all in int8: reported in full, and the exit code says so, unless it is asked to be silent.

    The same command again finds all done and ends alike.
    """
    settings = (
        "recipe=quantize", "~stages.nf4", "compare=[{arm: int8, base: reference, on: [quality, serving]}]",
        "stages.int8.include=[model.layers.0.self_attn.k_proj]", *TINY,
    )  # fmt: skip
    for allow, code in (("false", 3), ("false", 3), ("true", 0)):
        done = pipeline(tmp_path, *settings, f"allow_no_speedup={allow}")
        assert done.returncode == code, done.stderr
        assert ("no_speedup: int8: neither time nor memory is saved" in done.stderr) is (code == 3)
        assert "neither time nor memory is saved)" in " ".join(done.stdout.split())
        result = result_in(tmp_path)
        assert result["status"] == "FINISHED"
        (pair,) = result["comparisons"]
        assert pair["speedup"]["no_speedup"] is True
        assert 0 < pair["speedup"]["memory"]["v"] < 0.05
    report = (tmp_path / "mlruns/latest/report.md").read_text()
    assert "no_speedup: saves neither time nor memory" in report
    assert "What quantizing changed" in report
    artifact = json.loads(Path(result["rows"][1]["artifact"]["path"], "artifact.json").read_text())
    assert artifact["quantization"]["quantized_layers"] == 1
    assert artifact["assessed"]["quality"]["bits_per_byte"]["ci"] is not None
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlruns/mlflow.db'}")
    parents = [run for run in client.search_runs(["1"]) if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 3
    assert {run.data.tags["no_speedup"] for run in parents} == {"int8"}
    assert {run.info.status for run in parents} == {"FINISHED"}


def test_a_search_that_finds_nothing_cheaper_leaves_the_model_and_is_charged(tmp_path: Path) -> None:
    """On a CPU NF4 is smaller and slower: sought for time the model stays as it is, and the trial was work."""
    settings = ("recipe=quantize_search", "stages.quantized.candidates=[nf4]", "tracking.mlflow=false",
                "stages.quantized.tolerance=1", *TINY)  # fmt: skip
    done = pipeline(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    reference, quantized = result["rows"]
    assert quantized["artifact"]["digest"] == reference["artifact"]["digest"]
    assert quantized["quality"]["flips"]["v"] == 0
    phases = quantized["ledger"]["phases_ns"]
    assert phases["search"] > 0.5 * sum(ns for name, ns in phases.items() if name not in ("eval", "model_load"))
    assert quantized["ledger"]["device_hours"]["work"]["v"] * 3600e9 > phases["search"]
    notes = " ".join(result["environment"]["notes"])
    assert "quantized: tried nf4: loses" in notes
    assert "quantized: stays as reference is: nothing that holds the tolerance saves time" in notes
    again = pipeline(tmp_path, *settings, "stages.quantized.prefer=memory")
    assert again.returncode == 0, again.stderr
    found = result_in(tmp_path)["rows"][-1]
    about = json.loads(Path(found["artifact"]["path"], "artifact.json").read_text())
    assert about["quantization"]["format"] == "nf4"
    assert about["search"]["trials"][0]["memory_ratio"] < 1
    assert found["artifact"]["bytes"] < reference["artifact"]["bytes"]


def test_a_precision_found_by_trial_is_charged_and_inherited(tmp_path: Path) -> None:
    """Student and control of the same settings train in one precision; the trials are the student's work."""
    done = pipeline(
        tmp_path, "recipe=distill", "precision=auto", "stages.teacher.steps=4", "tracking.mlflow=false", *TINY
    )
    assert done.returncode == 0, done.stderr
    result = result_in(tmp_path)
    rows = {row["arm"]: row for row in result["rows"]}
    assert rows["teacher"]["ledger"]["phases_ns"]["search"] > 0
    assert rows["student"]["ledger"]["phases_ns"]["search"] > 0
    assert rows["control_steps"]["ledger"]["phases_ns"].get("search", 0) == 0
    about = {
        arm: json.loads(Path(row["artifact"]["path"], "artifact.json").read_text())["precision"]
        for arm, row in rows.items()
    }
    assert about["control_steps"]["chosen"] == about["control_compute"]["chosen"] == about["student"]["chosen"]
    notes = " ".join(result["environment"]["notes"])
    assert f"student: precision {about['student']['chosen']}: bf16 " in notes
    assert f"control_steps: precision {about['student']['chosen']}: as student has it" in notes
    assert "not tf32: tf32 needs a CUDA device" in notes
