"""A measurement never kills the work: each is broken on purpose, by exceptions nobody foresaw,
while a small run ends.

The model is there and whole, the exit code is 0, and result and report say what could not be
measured and why.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from here import here
from reports import markdown, whole_report

import pipeline.evaluation.quality.assess
import pipeline.evaluation.serving.measure
import pipeline.evaluation.serving.vllm_check
import pipeline.runs.comparison
import pipeline.stages.teaching
import pipeline.stages.training
from pipeline.errors import BudgetSpent, Preempted, StageFailed, UserError
from pipeline.ledger import flops, memory, others
from pipeline.ledger.attempted import attempted, unmeasured
from pipeline.ledger.gpu_phases import GpuPhases
from pipeline.ledger.gpu_sampler import Sampler
from pipeline.ledger.memory import MemoryMeter
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.ledger.traced_steps import StepTracer
from pipeline.stages import step_flops
from pipeline.store.artifacts import digest_folder

TINY = [
    "tracking.charts=false",
    "recipe=distill",
    "stages.teacher.steps=2",
    "training.steps=2",
    "training.batch_size=4",
    "training.sequence_length=48",
    "training.eval_documents=1",
    "data.max_documents=24",
    "quality.max_documents=20",
    "quality.bootstrap=200",
    "model.shape.hidden_size=64",
    "model.shape.heads=1",
    "model.shape.intermediate_size=64",
    "model.shape.layers=2",
    "serving.blocks=2",
    "serving.load.new=2",
    "serving.load.prompt=8",
    "serving.batches=[1]",
    "stages.student.allow_weak_teacher=true",
    "tracking.mlflow=false",
    "serving.check_vllm=every",
]

PLAIN = ["tracking.charts=false", *TINY[3:-3]]  # of a recipe without a student


class Boom(ArithmeticError):
    """Of a kind that nothing here names."""


def boom(*_: Any, **__: Any) -> Any:
    raise Boom("broken on purpose")


def run(folder: Path, *more: str) -> tuple[int, dict[str, Any], str]:
    step_flops._counted.clear()  # others of this process may have counted this model
    done = here(folder, *TINY, *more)
    latest = folder / "mlruns/latest"
    result = json.loads((latest / "result.json").read_text()) if latest.exists() else {}
    if result:
        jsonschema.validate(result, RESULT_SCHEMA)
    return (done.returncode, result, whole_report(latest) if latest.exists() else done.stderr)


# -- the one helper -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError, ZeroDivisionError, RecursionError, MemoryError, OSError, Boom]
)
def test_any_failure_of_a_measurement_is_a_reason(error: type[Exception]) -> None:
    def fail() -> str:
        raise error("first line\nand a stack")

    assert attempted(fail, lambda why: why) == f"{error.__name__}: first line"
    assert attempted(lambda: "read", lambda why: why) == "read"


@pytest.mark.parametrize(
    "error",
    [
        UserError("k", "p", "r"),
        StageFailed("s"),
        Preempted("p"),
        BudgetSpent("b"),
        KeyboardInterrupt(),
        SystemExit(1),
    ],
)
def test_what_is_meant_to_end_a_run_ends_it(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        attempted(fail, lambda _: None)


# -- all at once, and each alone ------------------------------------------------------------------

BREAKS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "flops": (
        lambda patch: patch.setattr(flops, "_twin", boom),
        "cannot be counted (Boom: broken on purpose)",
    ),
    "accounts": (
        lambda patch: patch.setattr(others, "accounts", boom),
        "accounts cannot be read (Boom: broken on purpose)",
    ),
    "memory": (
        lambda patch: patch.setattr(memory, "_status_bytes", boom),
        "the process's memory could not be measured",
    ),
    "peak": (
        lambda patch: patch.setattr("pipeline.runs.rows.peak", boom),
        "the peak rate could not be measured",
    ),
    "sampler": (lambda patch: patch.setattr(Sampler, "_tick", boom), ""),
    "placement": (
        lambda patch: patch.setattr("pipeline.runs.opening.placement", boom),
        "the placement could not be measured",
    ),
    "grant": (
        lambda patch: patch.setattr("pipeline.runs.opening.grant", boom),
        "the scheduler's grant could not be",
    ),
    "environment": (lambda patch: patch.setattr("pipeline.runs.environment.version", boom), ""),
    "commit": (
        lambda patch: patch.setattr(
            "pipeline.runs.environment.subprocess", SimpleNamespace(run=boom)
        ),
        "",
    ),
    "gradient": (
        lambda patch: patch.setattr(pipeline.stages.teaching, "gradient_share", boom),
        "the teacher's gradient could not be measured",
    ),
    "vllm": (
        lambda patch: [
            patch.setattr("pipeline.runs.assessor.vllm_why_not", lambda *_: None),
            patch.setattr("pipeline.runs.assessor.check_vllm", boom),
        ],
        "vLLM: failed (agreement with vLLM could not be measured",
    ),
    "vllm_question": (
        lambda patch: patch.setattr("pipeline.runs.assessor.vllm_why_not", boom),
        "vLLM could not be measured",
    ),
    "energy": (
        lambda patch: patch.setattr(pipeline.evaluation.serving.measure, "_units_per_joule", boom),
        "",
    ),
    "charge": (
        lambda patch: patch.setattr("pipeline.runs.charges.charge", boom),
        "what models cost could not be",
    ),
}
"""By measurement: what breaks its innermost call, and what the report then says."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, str]:
    folder = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        for name, (breaks, _) in BREAKS.items():
            if name != "vllm_question":
                breaks(patch)
        return *run(folder), str(folder)


def test_a_run_whose_measurements_all_fail_ends_well_and_its_models_are_whole(
    broken: tuple[int, dict[str, Any], str, str],
) -> None:
    code, result, _, _ = broken
    assert code == 0
    assert result["status"] == "FINISHED"
    for row in result["rows"]:
        assert row["status"] == "FINISHED", row["why"]
        path = Path(row["artifact"]["path"])
        assert digest_folder(path)[0] == row["artifact"]["digest"]
        assert row["quality"]["bits_per_byte"]["value"] > 0
        assert row["ledger"]["device_hours"]["attached"]["value"] > 0


@pytest.mark.parametrize(
    "name", [name for name, (_, said) in BREAKS.items() if said and name != "vllm_question"]
)
def test_result_and_report_say_what_was_not_measured(
    broken: tuple[int, dict[str, Any], str, str], name: str
) -> None:
    _, result, report, _ = broken
    said = BREAKS[name][1]
    assert said in json.dumps(result, ensure_ascii=False), name
    assert said in report.replace("\\", ""), name


def test_the_nulls_stand_in_their_rows(broken: tuple[int, dict[str, Any], str, str]) -> None:
    _, result, _, _ = broken
    rows = {row["arm"]: row["ledger"] for row in result["rows"]}
    student = rows["student"]
    assert student["counts"]["model_flops"]["value"] is None
    assert student["counts"]["active_parameter_share"]["value"] is None
    assert student["counts"]["peak_tflops"]["value"] is None
    assert student["counts"]["distillation_gradient_share"]["value"] is None
    assert student["memory"]["host_peak_rss_bytes"]["value"] is None
    assert student["conditions"]["work_foreign_load"]["value"] is None
    pair = next(pair for pair in result["comparisons"] if pair["base"] == "control_compute")
    assert pair["training"]["algorithmic"]["value"] is None
    assert pair["training"]["algorithmic"]["why_missing"].startswith("FLOPs not counted")


def test_a_control_goes_by_six_n_where_nothing_is_counted_and_says_so(
    broken: tuple[int, dict[str, Any], str, str],
) -> None:
    _, result, report, _ = broken
    steps = {row["arm"]: row["ledger"]["counts"]["steps"]["value"] for row in result["rows"]}
    assert steps["control_compute"] >= steps["student"]  # the teacher's forward is matched, too
    said = (
        f"control_compute: {steps['control_compute']} steps match student's FLOPs by the rule of"
        " thumb (6N, estimated)"
    )
    assert any(note.startswith(said) for note in result["environment"]["notes"])
    assert "by the rule of thumb (6N, estimated)" in report


# -- what decides more than a figure --------------------------------------------------------------


def test_where_not_even_six_n_is_known_the_control_says_why_it_has_no_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flops, "_twin", boom)
    monkeypatch.setattr("pipeline.stages.step_flops.six_n", boom)
    done = here(tmp_path, *TINY)
    assert done.returncode == 1
    assert (
        "student has no FLOPs to match: the model cannot be counted (Boom: broken on purpose)"
        in done.stderr
    )
    made = list((tmp_path / "mlruns/store/keys").glob("*.json"))
    assert len(made) >= 2  # teacher and student are kept


def test_validation_that_fails_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.stages.training, "validation_metric", boom)
    code, result, report = run(tmp_path)
    assert code == 0
    assert (
        "validation after step 2 could not be measured (Boom: broken on purpose)"
        in report.replace("\\", "")
    )
    training = next(pair for pair in result["comparisons"] if pair["base"] == "control_compute")[
        "training"
    ]
    assert training["why_missing"] == "the arm has no validation reading"


def test_serving_that_fails_is_null_everywhere_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.evaluation.serving.measure, "measure_interleaved", boom)
    code, result, report = run(tmp_path)
    assert code == 0
    why = "serving could not be measured (Boom: broken on purpose)"
    pair = next(pair for pair in result["comparisons"] if pair["base"] == "teacher")
    assert (pair["serving"]["why_missing"], pair["payback"]["why_missing"]) == (why, why)
    assert {row["serving"]["device_s_per_1k_units"]["why_missing"] for row in result["rows"]} == {
        why
    }
    assert why in report.replace("\\", "")


def test_quality_that_fails_loses_nothing_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An assessment is no mere measurement: the run fails, and the same command resumes from the
    trained model.
    """
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.evaluation.quality.assess, "score_causal", boom)
        assert here(tmp_path, *TINY).returncode == 1
    (folder,) = (tmp_path / "mlruns/runs").iterdir()
    first = json.loads((folder / "result.json").read_text())
    (row,) = first["rows"]
    assert (row["arm"], row["status"]) == ("teacher", "FAILED")
    trained = list((tmp_path / "mlruns/store/artifacts").iterdir())
    code, result, _ = run(tmp_path)
    assert (code, result["run_id"], result["run"]["attempts"]) == (0, folder.name, 2)
    teacher = next(
        row for row in result["rows"] if row["arm"] == "teacher" and row["status"] == "FINISHED"
    )
    assert Path(teacher["artifact"]["path"]) in trained
    assert teacher["ledger"]["device_hours"]["work"]["value"] == 0  # not trained again


@pytest.mark.parametrize("error", [Boom, RuntimeError])
def test_a_writer_that_cannot_be_started_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: Any) -> Any:
        raise error("no process")

    monkeypatch.setattr("pipeline.runs.opening.start_writer", fail)
    done = here(tmp_path, "recipe=baseline", *PLAIN)
    assert done.returncode == 0, done.stderr
    report = whole_report(tmp_path / "mlruns/latest").replace("\\", "")
    assert f"what MLflow is given could not be measured ({error.__name__}: no process)" in report


# -- on a device ----------------------------------------------------------------------------------


def test_a_devices_memory_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    device, meter = SimpleNamespace(type="cuda"), MemoryMeter()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", boom)
    meter.start(device)
    why = unmeasured("the device's memory", "Boom: broken on purpose")
    assert {
        value.why_missing
        for name, value in meter.read(device).items()
        if name == "peak_allocated_bytes"
    } == {why}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_accumulated_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", boom)
    meter.start(device)
    assert meter.read(device)["ooms"].why_missing == why


def test_device_events_that_fail_are_a_reason() -> None:
    event = SimpleNamespace(record=lambda: None, query=boom, elapsed_time=boom)
    for phases in (GpuPhases(boom), GpuPhases(lambda: event)):  # pyright: ignore[reportArgumentType]
        phases.edge("forward")
        phases.edge("backward")
        phases.resolve()
        assert (
            phases.why_none
            == "device time by phase could not be measured (Boom: broken on purpose)"
        )
        phases.edge("optimizer")
        assert phases.phases_s() == {}


@pytest.mark.parametrize("what", ["start", "stop", "export_chrome_trace"])
def test_a_profiler_that_fails_unforeseen(tmp_path: Path, what: str) -> None:
    from pipeline.ledger.phases import PhaseClock

    profiler: Any = SimpleNamespace(
        start=lambda: None, stop=lambda: None, export_chrome_trace=lambda _: None
    )
    setattr(profiler, what, boom)
    tracer = StepTracer(tmp_path, torch.device("cuda"), (2,), make_profiler=lambda _: profiler)
    clock = PhaseClock()
    tracer.open(clock)
    if tracer.closes_after(2):
        tracer.close(2, clock)
    found = tracer.result()
    assert found["notes"] == ["steps could not be traced (Boom: broken on purpose)"]
    assert found["shares"]["busy"]["value"] is None


# -- lm-eval --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lm_eval_that_fails_after_training_leaves_nulls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.config.settings.quality import QualityConfig
    from pipeline.evaluation.quality import tasks

    data = tmp_path / "questions.jsonl"
    data.write_text(
        "".join(json.dumps({"q": f"{n} plus one is", "a": f" {n + 1}"}) + "\n" for n in range(6))
    )
    file = tmp_path / "sums.yaml"
    file.write_text(
        "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test:"
        " questions.jsonl}}\ntest_split: test\noutput_type: loglikelihood\ndoc_to_text:"
        " '{{q}}'\ndoc_to_target: '{{a}}'\nmetric_list: [{metric: acc}]\n"
    )
    config = QualityConfig(tasks=[str(file)])
    assert tasks.asked_metrics(config) == [("sums", "acc")]
    monkeypatch.setattr(tasks, "run_tasks", boom)
    found = pipeline.evaluation.quality.assess._no_tasks(
        config, tmp_path / "items.jsonl", "Boom: broken on purpose"
    )
    assert (
        found["task/sums/acc"]["why_missing"]
        == "lm-eval's tasks could not be measured (Boom: broken on purpose)"
    )
    pytest.importorskip("lm_eval")
    done = here(
        tmp_path, "recipe=baseline", *PLAIN, "tracking.mlflow=false", f"quality.tasks=[{file}]"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "mlruns/latest/result.json").read_text())
    (row,) = result["rows"]
    assert row["quality"]["task/sums/acc"] == found["task/sums/acc"]
    assert row["quality"]["bits_per_byte"]["value"] > 0
    assert "lm-eval's tasks could not be measured" in markdown(result).replace("\\", "")
    monkeypatch.undo()
    again = here(
        tmp_path, "recipe=baseline", *PLAIN, "tracking.mlflow=false", f"quality.tasks=[{file}]"
    )
    assert again.returncode == 0, again.stderr
    found = json.loads((tmp_path / "mlruns/latest/result.json").read_text())["rows"]
    # a failure is not kept
    assert any(row["quality"].get("task/sums/acc", {}).get("value") is not None for row in found)
    shutil.rmtree(tmp_path / "mlruns")
