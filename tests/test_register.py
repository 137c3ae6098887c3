"""A model trained elsewhere becomes an artifact with its cost, and recipes charge it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from make_assess_models import saved, tiny
from make_result import make_result, make_row, make_unfinished, null
from mlflow import MlflowClient

from pipeline.cli.commands.register import find_run, main, read_charge, register
from pipeline.compare.savings import all_in, c_opt, c_total
from pipeline.config.arms import BASE, STUDENT_INIT
from pipeline.config.settings.model import ModelConfig, StudentConfig
from pipeline.config.settings.run import Run
from pipeline.ledger.peaks import device_name
from pipeline.ledger.schema import RESULT_SCHEMA
from pipeline.runs.charges import spends_of
from pipeline.runs.past_cost import past_spend
from pipeline.stages.table import STAGES
from pipeline.store.artifacts import digest_folder, write_json
from pipeline.tasks.table import Task
from pipeline.tracking.deliver import deliver

CPU = SimpleNamespace(type="cpu")
HERE = device_name(CPU)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tiny(Task.causal_lm), tmp_path_factory.mktemp("model"))


@pytest.fixture
def trained(model: Path, tmp_path: Path) -> Path:
    """A folder as a trainer leaves it: beside the model, what could run code."""
    folder = tmp_path / "trained"
    shutil.copytree(model, folder)
    (folder / "training_args.bin").write_bytes(b"\x80\x04.")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"\x80\x04.")
    return folder


def metered(root: Path, *command: str | Path) -> Path:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline",
            "meter",
            "--name",
            "sft",
            "--root",
            str(root),
            "--no-mlflow",
            "--",
            *map(str, command),
        ],
        check=False,
        capture_output=True,
    )
    return sorted((root / "runs").iterdir())[-1]


def a_run(
    root: Path, name: str = "20250101-000000-distill-0000", made: Path | None = None, **changes: Any
) -> Path:
    """A recipe's run that made the model `made`: teacher 30 min, student 20 min of work and a
    failed attempt of 6.
    """
    folder = root / "runs" / name
    failed = make_unfinished("student", "FAILED", "diverged", ledger=_lost(6))
    rows = [make_row("teacher"), failed, make_row("student", attempt=2), make_row("control_steps")]
    if made is not None:
        rows[2]["artifact"]["digest"] = digest_folder(made)[0]
    device = {"kind": "cpu", "name": HERE, "count": 1}
    write_json(
        folder / "result.json", make_result(rows=rows, run_id=name, device=device, **changes)
    )
    return folder


def _lost(minutes: float) -> dict[str, Any]:
    from make_result import make_ledger

    return make_ledger(0, 0, retry_min=minutes)


def test_a_metered_command_s_model_is_charged_with_its_hours(
    root: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_dir = metered(root, "cp", "-r", trained, out)
    assert main([f"path={out}", "ledger=latest", f"root={root}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = Path(lines[0])
    assert folder.parent == root / "store" / "artifacts"
    assert lines[2] == f"use it: model.path={folder}"
    result = json.loads((run_dir / "result.json").read_text())
    Draft202012Validator(RESULT_SCHEMA).validate(result)
    hours = result["rows"][0]["ledger"]["device_hours"]["work"]["value"]
    manifest = json.loads((folder / "artifact.json").read_text())
    assert (manifest["kind"], manifest["digest"], manifest["name"]) == ("model", folder.name, "sft")
    assert manifest["ledger"]["run_id"] == run_dir.name
    assert manifest["ledger"]["work_device_hours"] == hours > 0
    assert result["rows"][0]["artifact"]["path"] == str(folder)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "artifact.json"} <= names
    assert not {"training_args.bin", "checkpoint-10"} & names
    assert (folder / "model.safetensors").stat().st_ino == (out / "model.safetensors").stat().st_ino
    before = {
        path: path.stat().st_mtime_ns
        for path in root.rglob("*")
        if path.is_file() and "locks" not in path.parts
    }
    assert main([f"path={out}", f"ledger={run_dir}", f"root={root}"]) == 0  # again: nothing changes
    assert {path: path.stat().st_mtime_ns for path in before} == before
    deliver(run_dir)
    client = MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("meter")
    assert experiment is not None
    (shown,) = client.search_logged_models([experiment.experiment_id])
    assert (shown.name, shown.tags["path"]) == (f"sft-{folder.name[:8]}", str(folder))
    assert past_spend(BASE, str(folder), HERE).work_h == hours


def _attempt(model: str | None, student: str | None = None, device: Any = CPU) -> Any:
    run = Run(model=ModelConfig(path=model), student=StudentConfig(path=student))
    run.stages = {"teacher": STAGES["train"](), "student": STAGES["distill"]()}
    run.stages["student"].teacher, run.stages["student"].model = "teacher", STUDENT_INIT
    rows = [make_row("teacher"), make_row("student")]
    return SimpleNamespace(
        session=SimpleNamespace(run=run, stages=run.stages, device=device, gate=None),
        book=SimpleNamespace(rows=rows),
    )


def test_a_registered_model_is_in_every_chain_that_starts_from_it(
    tmp_path: Path, trained: Path, model: Path
) -> None:
    artifact, _ = register(trained, a_run(tmp_path, made=model), tmp_path)
    spends = spends_of(_attempt(str(artifact.path)), 0)
    base_h, retry_h, teacher_h, student_h = 50 / 60, 6 / 60, 30 / 60, 20 / 60
    # teacher and student of that run, not its control
    assert spends[BASE].work_h == pytest.approx(base_h)
    assert c_total("teacher", spends).value == pytest.approx(base_h + teacher_h)
    assert all_in("teacher", spends).value == pytest.approx(base_h + retry_h + teacher_h)
    assert c_opt("student", "teacher", spends).value == pytest.approx(
        student_h
    )  # shared: it cancels
    assert spends[BASE].flops == pytest.approx(2e13)
    unregistered = spends_of(_attempt(str(trained)), 0)
    assert c_total("teacher", unregistered).why_missing == "existing model: base"
    both = spends_of(_attempt(None, student=str(artifact.path)), 0)
    assert c_total("student", both).value == pytest.approx(base_h + teacher_h + student_h)
    assert spends_of(_attempt(None), 0)[BASE].work_h == 0.0


def test_hours_of_another_device_are_never_added(
    tmp_path: Path, trained: Path, model: Path
) -> None:
    artifact, _ = register(trained, a_run(tmp_path, made=model), tmp_path)
    spend = past_spend(BASE, str(artifact.path), "NVIDIA H200")
    why = f"registered hours are of {HERE}, not of NVIDIA H200"
    assert (spend.existing, spend.work_h, spend.unknown) == (True, 0.0, why)
    assert c_total(BASE, {BASE: spend}).why_missing == f"{why}: base"


def test_a_model_changed_since_is_not_the_registered_one(
    tmp_path: Path, trained: Path, model: Path
) -> None:
    artifact, _ = register(trained, a_run(tmp_path, made=model), tmp_path)
    mine = tmp_path / "mine"
    shutil.copytree(artifact.path, mine)
    assert past_spend(BASE, str(mine), HERE).work_h > 0  # a copy of all of it takes its cost along
    (mine / "config.json").write_text((mine / "config.json").read_text() + "\n")
    spend = past_spend(BASE, str(mine), HERE)
    assert (spend.existing, spend.unknown) == (
        True,
        "existing model, changed since it was registered",
    )


def test_reasons_of_two_unknown_models_stand_beside_each_other() -> None:
    spends = {BASE: past_spend(BASE, "org/model", HERE), "x": past_spend("x", "org/other", HERE)}
    assert all(spend.existing for spend in spends.values())
    from dataclasses import replace

    spends["x"] = replace(spends["x"], depends_on=(BASE,), unknown="odd")
    assert c_total("x", spends).why_missing == "existing model: base; odd: x"


def test_a_run_is_found_by_id_folder_or_as_the_latest(tmp_path: Path) -> None:
    old, new = (
        a_run(tmp_path, "20250101-000000-distill-0000"),
        a_run(tmp_path, "20250102-000000-distill-0000"),
    )
    a_run(tmp_path, "20250103-000000-distill-0000", status="FAILED", why="diverged")
    assert find_run(tmp_path, "latest") == new
    assert find_run(tmp_path, old.name) == find_run(tmp_path, str(old)) == old
    charge = read_charge(old)
    assert {(row["arm"], row["status"]) for row in charge.rows} == {
        ("teacher", "FINISHED"),
        ("student", "FAILED"),
        ("student", "FINISHED"),
    }


def test_a_figure_that_a_row_lacks_is_not_made_up(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    result["rows"][0]["ledger"]["counts"]["model_flops"] = null("not counted")
    write_json(folder / "result.json", result)
    known = read_charge(folder).to_json()
    assert (known["model_flops"], known["energy_j"], known["tokens"]) == (None, None, 409_600)


# -- what is refused ------------------------------------------------------------------------------


def _without(*names: str) -> Any:
    return lambda folder: [path.unlink() for name in names for path in folder.glob(name)]


def _pickle(folder: Path) -> None:
    _without("*.safetensors")(folder)
    torch.save({}, folder / "pytorch_model.bin")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-2-of-2.safetensors"}})
    )


MODELS: list[tuple[Any, str]] = [
    (_without("*"), "path: {} has no config.json"),
    (_without("*.safetensors"), "path: {} has no weights (*.safetensors)"),
    (
        _pickle,
        (
            "path: {} holds pickled weights (pytorch_model.bin), which can run code; convert to"
            " safetensors"
        ),
    ),
    (_truncate, "path: {}/model.safetensors is no whole safetensors file"),
    (
        _index,
        (
            "path: {} lacks model-2-of-2.safetensors, which model.safetensors.index.json names;"
            " copy the whole"
        ),
    ),
    (_without("tokenizer*", "special*"), "path: its tokenizer in {} cannot be loaded"),
]


@pytest.mark.parametrize(("damage", "said"), MODELS)
def test_models_that_cannot_be_taken(
    damage: Any, said: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_run(tmp_path)
    shutil.rmtree(trained / "checkpoint-10")
    damage(trained)
    assert main([f"path={trained}", "ledger=latest", f"root={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"refused: {said.format(trained)}"), err
    assert not (tmp_path / "store").exists()


def test_a_model_that_its_run_did_not_make_is_refused(
    trained: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = a_run(tmp_path, made=model)
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "initializer_range": 0.5}))
    assert main([f"path={trained}", f"ledger={run_dir.name}", f"root={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"refused: ledger: {run_dir.name} made another model than {trained}: ")
    assert not list((tmp_path / "store/artifacts").iterdir())


def test_a_name_that_was_given_stays(trained: Path, model: Path, tmp_path: Path) -> None:
    run_dir = a_run(tmp_path, made=model)
    names = []
    for name in (None, "ours", None):
        artifact, _ = register(trained, run_dir, tmp_path, name=name)
        names.append(json.loads((artifact.path / "artifact.json").read_text())["name"])
    assert names == ["student", "ours", "ours"]


def test_a_model_is_charged_to_one_run_only(
    trained: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (
        a_run(tmp_path, made=model),
        a_run(tmp_path, "20250102-000000-distill-0000", made=model),
    )
    artifact, _ = register(trained, old, tmp_path)
    assert main([f"path={trained}", f"ledger={new}", f"root={tmp_path}"]) == 1
    said = (
        f"ledger: this model is registered with run {old.name}; name that run, or remove"
        f" {artifact.path} first"
    )
    assert capsys.readouterr().err == f"refused: {said}\n"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        ([], 1, "path: is missing; python -m pipeline register path=MODEL ledger=RUN"),
        (["path=x"], 1, "ledger: is missing"),
        (["x"], 2, "x: cannot be parsed; write key=value"),
        (["path="], 1, "path: is empty; give path=, ledger=, name=, root="),
        (
            ["path=x", "ledger=y", "name=a\x1b[31m"],
            1,
            "name: 'a\\x1b[31m' has characters that nobody sees; use",
        ),
        (["model=x"], 1, "model: is no setting of register; give path="),
        (
            ["path=x", "ledger=no-run"],
            1,
            "ledger: no-run is no run under mlruns/runs that has ended; give a run's id",
        ),
        (
            ["path=x", "ledger=latest"],
            1,
            "ledger: no run under mlruns/runs has finished; name one by its id or folder",
        ),
    ],
)
def test_refusals(
    argv: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == code
    err = capsys.readouterr().err
    assert err.startswith(f"refused: {said}"), err
    assert err.count("\n") == 1


def test_a_command_that_failed_made_no_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = metered(tmp_path, "false")
    assert main([f"path={trained}", f"ledger={run_dir.name}", f"root={tmp_path}"]) == 1
    said = (
        f"ledger: {run_dir.name} ended FAILED without sft: exit code 1; name the run that made the"
        " model"
    )
    assert capsys.readouterr().err == f"refused: {said}\n"
