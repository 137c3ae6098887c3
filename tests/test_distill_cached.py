"""recipe=distill_cached at toy size: rows, FLOPs, reuse, resume, MLflow, the report, and what is
refused beforehand.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from here import result_in
from make_journal import store, write_run
from make_result import ARMS, DEPENDS, make_pair, make_quality, make_result, make_row, null, value
from reports import markdown

from pipeline.cli.main import main
from pipeline.cli.recipes import find_recipes
from pipeline.cli.validate import validate
from pipeline.config.settings.data import DataConfig
from pipeline.config.settings.distillation import CaptureMethod, Divergence
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.run import Comparison, Measure, Run
from pipeline.data.batches import PackedBatches
from pipeline.data.encode import encode_all
from pipeline.data.load import load_dataset
from pipeline.distillation.cache import TeacherCache, shard_name
from pipeline.errors import UserError
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.models.load import load_model, load_tokenizer
from pipeline.report.conclusion import conclude
from pipeline.report.tables import closing_table
from pipeline.runs.out_of_memory import explain
from pipeline.stages import capturing as capture_module
from pipeline.stages.capture import CaptureStage
from pipeline.stages.distill import DistillStage
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.tracking.deliver import deliver

TINY = [
    "tracking.charts=false",
    "recipe=distill_cached",
    "tracking.mlflow=false",
    "stages.teacher.steps=2",
    "training.steps=4",
    *(
        "training.batch_size=4",
        "training.sequence_length=64",
        "data.max_documents=30",
        "training.eval_documents=1",
    ),
    *(
        "model.shape.hidden_size=64",
        "model.shape.heads=1",
        "model.shape.intermediate_size=128",
        "model.shape.layers=2",
    ),
    *("quality.max_documents=20", "quality.bootstrap=200", "quality.max_bytes_per_document=400"),
    *(
        "serving.blocks=2",
        "serving.load.new=2",
        "serving.load.prompt=8",
        "serving.load.batch=1",
        "serving.batches=[]",
    ),
]
ARMS_OF_RUN = ["teacher", "capture", "student", "control_steps", "control_compute"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run in which loading a teacher beside the student would fail."""
    cwd = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr("pipeline.stages.training.load_teacher", None)
        assert main(TINY, started_ns=0) == 0
    return cwd, result_in(cwd)


def test_a_capture_has_a_row_of_its_own_and_no_quality(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    _, result = trained
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == ARMS_OF_RUN
    row, ledger = rows["capture"], rows["capture"]["ledger"]
    assert (row["status"], row["type"], row["artifact"]["kind"]) == (
        "FINISHED",
        "capture",
        "teacher_cache",
    )
    assert (row["quality"], row["serving"], row["depends_on"]) == ({}, {}, ["teacher"])
    assert ledger["phases_ns"]["capture"] > 0
    assert ledger["device_hours"]["work"]["value"] > ledger["device_hours"]["assess"]["value"] == 0
    assert ledger["meter_valid"], ledger["meter_problems"]
    assert ledger["counts"]["model_flops"]["value"] > 0
    assert 0 < ledger["counts"]["target_tokens"]["value"] <= ledger["counts"]["tokens"]["value"]
    assert rows["student"]["depends_on"] == ["teacher", "capture"]
    assert "teacher" not in rows["student"]["ledger"]["phases_ns"]
    assert rows["student"]["ledger"]["counts"]["distillation_share"]["value"] != 0
    parts = {name: value["value"] for name, value in result["run"]["device_hours"].items()}
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    manifest = json.loads(Path(row["artifact"]["path"], "manifest.json").read_text())
    assert manifest["bytes_per_token"] <= 72
    assert manifest["windows"] == 16
    assert any("32 draws" in note for note in result["environment"]["notes"])


def test_the_student_is_charged_with_the_capture_and_the_control_is_given_its_flops(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    _, result = trained
    rows = {row["arm"]: row["ledger"] for row in result["rows"]}
    flops = {arm: ledger["counts"]["model_flops"]["value"] for arm, ledger in rows.items()}
    own = flops["control_steps"]  # the student's own, without any teacher: the same steps
    assert flops["student"] == pytest.approx(own)
    per_step = own / 4
    assert 0 <= flops["student"] + flops["capture"] - flops["control_compute"] < per_step
    training = result["comparisons"][0]["training"]
    work = {arm: ledger["device_hours"]["work"]["value"] for arm, ledger in rows.items()}
    assert training["c_arm"]["value"] == pytest.approx(
        work["teacher"] + work["capture"] + work["student"]
    )


def test_the_same_command_again_reuses_the_capture_and_a_damaged_cache_is_captured_anew(
    trained: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd, first = trained
    monkeypatch.chdir(cwd)
    assert main(TINY, started_ns=0) == 0
    second = result_in(cwd)
    assert [row["arm"] for row in second["rows"]] == ARMS_OF_RUN
    assert {row["reused"] for row in second["rows"]} == {first["run_id"]}
    assert second["run"]["device_hours"]["work"]["value"] == 0
    spent = {part: value["value"] for part, value in first["run"]["device_hours"].items()}
    assert second["run"]["reused"]["value"] == pytest.approx(
        spent["work"] + spent["assess"] + spent["compare"]
    )
    was, now = (
        next(row for row in result["rows"] if row["arm"] == "capture") for result in (first, second)
    )
    assert now["artifact"] == was["artifact"]
    shard = Path(was["artifact"]["path"], shard_name(0))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(content)
    assert main(TINY, started_ns=0) == 0
    third = {row["arm"]: row for row in result_in(cwd)["rows"]}
    assert third["capture"]["reused"] is None
    assert third["capture"]["artifact"]["digest"] == was["artifact"]["digest"]  # bit for bit
    assert third["student"]["reused"] == first["run_id"]


@pytest.mark.slow
@pytest.mark.faults
def test_a_capture_that_is_terminated_goes_on_and_its_hours_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(capture_module, "SHARD_TOKENS", 256)  # a batch
    write, written = capture_module.write_shard, list[str]()

    def terminated(path: Path, *rest: Any) -> str:
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return write(path, *rest)

    monkeypatch.setattr(capture_module, "write_shard", terminated)
    assert main(TINY, started_ns=0) == 75
    assert "stopped after 2 of 4 shards" in capsys.readouterr().err
    check = TeacherCache.check
    with monkeypatch.context() as patch:  # and the student, as soon as it has opened the cache
        patch.setattr(
            TeacherCache,
            "check",
            lambda *args: (check(*args), os.kill(os.getpid(), signal.SIGTERM)),
        )
        assert main(TINY, started_ns=0) == 75
    assert "capture: resuming from step 2" in capsys.readouterr().out
    assert main(TINY, started_ns=0) == 0
    assert written == [shard_name(number) for number in range(4)]  # each captured once
    result = result_in(tmp_path)
    assert result["run"]["attempts"] == 3
    rows = [row for row in result["rows"] if row["arm"] == "capture"]
    assert [(row["attempt"], row["status"]) for row in rows] == [(1, "KILLED"), (2, "FINISHED")]
    assert all(row["ledger"]["device_hours"]["work"]["value"] > 0 for row in rows)
    assert all(row["ledger"]["meter_valid"] for row in rows)
    parts = {name: value["value"] for name, value in result["run"]["device_hours"].items()}
    assert parts["retry"] == 0
    assert parts.pop("total") == pytest.approx(sum(parts.values()))


def last_validation(cwd: Path, row: dict[str, Any]) -> float:
    """Return the last validation reading of the training that made a row's artifact."""
    records = (json.loads(path.read_text()) for path in cwd.glob("mlruns/store/keys/*.json"))
    made = next(
        r for r in records if "output" in r and r["artifact"]["digest"] == row["artifact"]["digest"]
    )
    return made["output"]["curve"][-1]["metric"]


def dense_kl(student: Path, teacher: Path) -> float:
    """Return the mean forward KL over 8 batches of validation windows, nats a token, from all of
    both distributions.
    """
    tokenizer, models = (
        load_tokenizer(teacher),
        [load_model(path, Task.causal_lm) for path in (teacher, student)],
    )
    documents = load_dataset(DataConfig(), Task.causal_lm).splits["validation"]
    encoded = encode_all(documents, tokenizer, Task.causal_lm, max_length=128)
    batches = PackedBatches(encoded, sequence_length=128, batch_size=16, seed=0)
    total, count = 0.0, 0
    with torch.inference_mode():
        for step in range(8):
            batch = batches.batch(step)
            keep = batch.pop("labels") != -100
            log_p, log_q = (
                model(**batch, use_cache=False).logits[keep].log_softmax(-1) for model in models
            )
            total, count = (
                total + (log_p.exp() * (log_p - log_q)).sum().item(),
                count + int(keep.sum()),
            )
    return total / count


@pytest.mark.slow
@pytest.mark.timeout(1800)  # four whole distillations
def test_a_cached_and_a_live_teacher_make_equal_students_of_the_embedded_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation and test metric and the dense divergence from the teacher: means of two seeds,
    within 1%.
    """
    monkeypatch.chdir(tmp_path)
    found: dict[str, list[float]] = {}
    settings = [
        "tracking.mlflow=false",
        "seeds=[0,1]",
        "~stages.control_steps",
        "~stages.control_compute",
        "compare=[{arm: student, base: teacher, on: [quality]}]",
    ]
    for recipe in ("distill", "distill_cached"):
        assert main([f"recipe={recipe}", *settings], started_ns=0) == 0
        rows = {(row["arm"], row["seed"]): row for row in result_in(tmp_path)["rows"]}
        figures: list[tuple[float, float, float]] = []
        for seed in (0, 1):
            student, teacher = rows["student", seed], rows["teacher", seed]
            folders = [Path(row["artifact"]["path"]) for row in (student, teacher)]
            level = student["quality"]["bits_per_byte"]["value"]
            figures.append((last_validation(tmp_path, student), level, dense_kl(*folders)))
        found[recipe] = [sum(parts) / 2 for parts in zip(*figures, strict=True)]
    assert found["distill_cached"] == pytest.approx(found["distill"], rel=0.01)


# -- refused before any device is touched ---------------------------------------------------------


def make_run(**student: Any) -> Run:
    stages = {
        "teacher": TrainStage(),
        "capture": CaptureStage(),
        "student": DistillStage(cache="capture", **student),
        "control": TrainStage(model="student_init", like="student", match_compute=True),
    }
    return Run(stages=stages, primary_arm="student", precision=PrecisionConfig(name=Precision.fp32))


def changed(stage: str, **changes: Any) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for name, to in changes.items():
            setattr(run.stages[stage] if stage else run, name, to)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            changed("student", divergence=Divergence.jsd),
            "stages.student.divergence: jsd needs the teacher's whole",
        ),
        (
            changed("student", cache="teacher"),
            "stages.student.cache: 'teacher' is no capture stage; name one of",
        ),
        (
            changed("student", temperature=2.0, cache="nobody"),
            "stages.student.cache: 'nobody' is no capture stage",
        ),
        (
            changed("capture", temperature=2.0),
            "stages.student.temperature: 1 is not the temperature of capture (2)",
        ),
        (
            changed("capture", teacher="base"),
            "stages.student.cache: capture captures base, not teacher",
        ),
        (
            changed("student", teacher_precision=Precision.fp32),
            "has no effect with a cache; set stages.capture",
        ),
        (
            changed("capture", draws=80),
            "stages.capture.draws: 80 is out of range; give a number of at most 64",
        ),
        (
            changed("capture", draws=11),
            "stages.capture.draws: 11 is out of range; give a number of at least 12",
        ),
        (changed("capture", k=5), "stages.capture.k: has no effect with method: sample"),
        (
            changed("capture", draws=20, method=CaptureMethod.top_k),
            "stages.capture.draws: has no effect with method",
        ),
        (
            changed("capture", like="control"),
            "stages.capture.like: control has no steps of its own to capture for",
        ),
        (
            changed("capture", like="nobody"),
            "'nobody' is no stage that trains; name one of teacher, student, control",
        ),
        (
            changed("student", model="capture"),
            "stages.student.model: 'capture' makes a teacher cache, not a model",
        ),
        (
            changed("control", model="capture"),
            "stages.control.model: 'capture' makes a teacher cache, not a model",
        ),
        (changed("", primary_arm="capture"), "primary_arm: there is no stage 'capture'"),
        (
            changed("", compare=[Comparison(arm="student", base="capture", on=[Measure.quality])]),
            "compare[0].base: there is no stage 'capture'",
        ),
    ],
)
def test_what_a_cache_cannot_do_is_refused_by_name(
    change: Callable[[Run], None], said: str
) -> None:
    run = make_run()
    validate(run)
    change(run)
    with pytest.raises(UserError) as error:
        validate(run)
    assert said in str(error.value)


def test_the_student_s_temperature_is_the_capture_s() -> None:
    run = make_run(temperature=2.0)
    validate(run)
    assert run.stages["capture"].captured(run)["temperature"] == 2.0


def test_a_teacher_that_does_not_fit_is_given_smaller_batches() -> None:
    run = make_run()
    said = explain(
        MemoryError("no room"),
        run,
        "capture",
        run.stages["capture"],
        "work",
        device=torch.device("cpu"),
        snapshot=Path("unused"),
    )
    assert said is not None
    assert (
        "first: training.gradient_accumulation=2 (now 1; the same batch in smaller parts)" in said
    )


def test_the_recipe_is_listed_with_its_question() -> None:
    recipe = find_recipes([])["distill_cached"]
    assert (
        recipe.question
        == "Is a distilled student worth it when its teacher is captured once and read from disk?"
    )


# -- reports and MLflow ---------------------------------------------------------------------------


def cache_row() -> dict[str, Any]:
    row = make_row("capture", type="capture", depends_on=["teacher"], quality={}, serving={})
    row["artifact"]["kind"] = "teacher_cache"
    row["ledger"]["counts"] |= {
        "tokens": null("this stage trains nothing"),
        "model_flops": value(6e12),
    }
    return row


def cached_result() -> dict[str, Any]:
    """The student's own FLOPs are 10, the capture's 6, the control's 16."""
    rows = [make_row(arm) for arm in ARMS["distill"]]
    rows[1]["depends_on"] = [*DEPENDS["student"], "capture"]
    rows[3]["ledger"]["counts"]["model_flops"] = value(1.6e13)
    worse = make_pair("student", "control_compute", quality=make_quality(-0.1, "worse"))
    return make_result(rows=[rows[0], cache_row(), *rows[1:]], comparisons=[worse])


def test_the_report_says_why_a_cache_has_no_figures_and_counts_its_flops_for_the_student() -> None:
    result = cached_result()
    jsonschema.validate(result, RESULT_SCHEMA)
    assert conclude(result)["answers"][0].startswith("Given the same FLOPs without a teacher (")
    result["rows"][2]["depends_on"] = ["teacher"]
    assert conclude(result)["answers"][0].startswith("Given 1.6x the FLOPs without a teacher")
    for text in (closing_table(cached_result()), markdown(cached_result())):
        assert "a teacher cache is no model: it has no quality and serves nothing" in " ".join(
            text.split()
        )
        assert "not recorded" not in text


def test_mlflow_shows_the_cache_on_its_run_and_not_among_models(root: Path) -> None:
    deliver(write_run(root, rows=[make_row("teacher"), cache_row(), make_row("student")]))
    _, runs = store(root)
    tags = runs["capture"].data.tags
    assert tags["teacher_cache.digest"] == cache_row()["artifact"]["digest"]
    assert "model.digest" not in tags
    assert not runs["capture"].outputs.model_outputs
    assert len(runs["student"].outputs.model_outputs) == 1
    assert runs["capture"].data.metrics["compute/model_flops"] == 6e12
    assert "quality/primary" not in runs["capture"].data.metrics
