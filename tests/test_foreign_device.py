"""Runs on a device of torch that is neither CPU nor CUDA, and on one that is lost meanwhile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import forked
import pytest
from here import here, result_in
from test_wheel import SMALL

TESTS = str(Path(__file__).resolve().parent)
RUN = f"import sys; sys.path.insert(0, {TESTS!r}); import host_device; sys.exit(host_device.run())"
BASELINE = (*SMALL, "recipe=baseline", "precision=fp32", "training.checkpoint_every=1")
LOST = (
    "stage baseline: the hostone device was lost (AcceleratorError: CUDA error: unspecified launch"
    " failure); first: the same command again, which goes on from the last checkpoint; where it"
    " happens again, another device (hardware.device)"
)


def _on_it(cwd: Path, *args: str) -> Any:
    return forked.run(cwd, *args, "hardware.device=hostone", code=RUN)


def _result(cwd: Path) -> dict[str, Any]:
    """Return the result of the one run in a folder, which need not have made a model."""
    (path,) = cwd.glob("mlruns/runs/*/result.json")
    return json.loads(path.read_text())


def _rows(result: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(row["arm"], row["attempt"], row["status"]) for row in result["rows"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Lose the device in the second of two steps, and give the same command again."""
    folder = tmp_path_factory.mktemp("foreign")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSE_IN_STEP", "2")
        lost = _on_it(folder, *BASELINE)
    first = _result(folder)
    again = _on_it(folder, *BASELINE)
    return {"lost": lost, "first": first, "again": again, "second": _result(folder)}


def test_a_device_that_is_lost_ends_its_stage_in_one_line(runs: dict[str, Any]) -> None:
    assert runs["lost"].returncode == 1
    assert [line for line in runs["lost"].stderr.splitlines() if "failed" in line] == [
        f"failed: {LOST}"
    ]


def test_its_row_is_true_and_the_result_is_there(runs: dict[str, Any]) -> None:
    result = runs["first"]
    (row,) = result["rows"]
    assert (result["status"], row["status"], row["why"]) == ("FAILED", "FAILED", LOST)
    assert row["ledger"]["device_hours"]["retry"]["value"] > 0
    assert row["ledger"]["counts"]["tokens"]["value"] is None
    assert result["device"] == {"kind": "hostone", "name": "Host One", "count": 1}


def test_the_same_command_goes_on_from_the_checkpoint(runs: dict[str, Any]) -> None:
    assert runs["again"].returncode == 0, runs["again"].stderr
    assert "baseline: resuming from step 1" in runs["again"].stdout
    result = runs["second"]
    assert _rows(result) == [("baseline", 1, "FAILED"), ("baseline", 2, "FINISHED")]
    assert result["run_id"] == runs["first"]["run_id"]


def test_the_ledger_of_a_foreign_device(runs: dict[str, Any]) -> None:
    """Its hours are of it, its time by phase is read by its events; what it has not is null."""
    ledger = runs["second"]["rows"][1]["ledger"]
    assert ledger["gpu_hours"]["attached"]["value"] > 0
    assert {"forward", "backward", "optimizer"} <= set(ledger["gpu_timeline"]["phases_s"])
    memory = ledger["memory"]["peak_allocated_bytes"]
    assert (memory["value"], memory["why_missing"]) == (
        None,
        "a hostone run: torch keeps no peaks of memory on it",
    )
    assert ledger["energy_j"]["why_missing"] == "no counters of hostone devices are read yet"


def test_what_it_computes_is_what_a_cpu_computes(runs: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted and resumed, on another device: the same model."""
    assert here(tmp_path, *BASELINE, "hardware.device=cpu").returncode == 0
    on_cpu = result_in(tmp_path)["rows"][0]["quality"]["bits_per_byte"]["value"]
    foreign = runs["second"]["rows"][1]["quality"]["bits_per_byte"]["value"]
    assert foreign == pytest.approx(on_cpu, rel=1e-4)


@pytest.mark.slow
def test_a_recipe_with_everything_in_it_runs_on_a_foreign_device(tmp_path: Path) -> None:
    """Teacher, student, controls, serving: the student's device is lost, the teacher is kept."""
    small = ("model.shape.layers=2", "stages.teacher.steps=2")
    load = [f"serving.load.{name}" for name in ("batch=2", "prompt=16", "new=4")]
    args = [*BASELINE[:-3], "recipe=distill", *BASELINE[-2:], *small, *load]
    args.append("stages.student.allow_weak_teacher=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSE_IN_STEP", "4")
        assert _on_it(tmp_path, *args).returncode == 1
    assert _rows(_result(tmp_path)) == [("teacher", 1, "FINISHED"), ("student", 1, "FAILED")]
    done = _on_it(tmp_path, *args)
    assert "teacher: running" not in done.stdout
    result = _result(tmp_path)
    assert result["status"] == "FINISHED"
    served = {row["arm"]: row["serving"] for row in result["rows"] if row["status"] == "FINISHED"}
    assert any(figure["value"] for figure in served["student"].values())
