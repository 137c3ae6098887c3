"""`python -m pipeline attribute`: which parts an arm has, the arms without them, and a real run."""

from __future__ import annotations

import json
import shutil
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from here import here
from test_run import TINY

from pipeline.cli.commands import attribute
from pipeline.cli.commands.attribute import main
from pipeline.cli.main import main as compose_main
from pipeline.compare.attribution import coalitions
from pipeline.errors import UserError
from pipeline.runs.receipts.receipt import read_kept
from pipeline.stages.variants import Arms, parts_of

RECIPE = """# Which schedule pays?
defaults:
  - /stage@stages.plain: train
  - /stage@stages.both: train
  - /stage@stages.small: train
stages:
  plain: {model: base}
  both: {model: base, start_sequence_length: 32, start_batch_size: 2, growth_fraction: 0.75}
  small: {model: base, start_batch_size: 2, growth_fraction: 0.75}
primary_arm: both
compare:
  - {arm: both, base: plain, on: [quality, training]}
"""
QUIET = ("tracking.mlflow=false", "ledger.max_foreign_load=null", "training.compile=never")


@pytest.fixture
def composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the run that a command line amounts to."""
    monkeypatch.chdir(tmp_path)

    def compose(*args: str) -> Any:
        taken: list[Any] = []
        compose_main(list(args), started_ns=0, execute=lambda run, *_: taken.append(run) or 0)
        return taken[0]

    return compose


def recipes(folder: Path, text: str = RECIPE) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "schedule.yaml").write_text(text)
    return ["--recipe-dir", str(folder), "recipe=schedule"]


# -- parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "arm", "base", "names"),
    [
        ("full", "student_int8", "baseline", ["precision", "student", "student_int8"]),
        ("full", "student_int8", "student", ["student_int8"]),
        ("full", "student_bf16", "student_int8", ["format"]),
        ("full", "teacher", "baseline", ["precision"]),
        ("distill", "student", "teacher", ["student"]),
        ("distill_cached", "student", "teacher", ["student"]),
        ("quantize", "int8", "reference", ["int8"]),
        ("schedules", "short_first", "plain", ["start_sequence_length"]),
        ("mixed_precision", "bf16", "fp32", ["precision"]),
    ],
)
def test_an_arm_has_what_its_base_has_not(
    composed: Any, recipe: str, arm: str, base: str, names: list[str]
) -> None:
    parts = parts_of(composed(f"recipe={recipe}"), arm, base)
    assert parts.names == names


@pytest.mark.parametrize(
    ("recipe", "arm", "base", "said"),
    [
        ("distill", "student", "control_compute", "control_compute is not student with parts left"),
        (
            "schedules",
            "stacked",
            "plain",
            "plain is not stacked with parts left out (plain against",
        ),
        ("distill", "teacher", "student", "student is not teacher with parts left out"),
        ("distill", "student", "student", "student and student do not differ"),
        ("distill", "studen", "teacher", "'studen' is no arm of this run"),
        ("distill", "student", "base", "'base' is no arm of this run"),
    ],
)
def test_what_is_no_arm_with_parts_left_out_is_refused(
    composed: Any, recipe: str, arm: str, base: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        parts_of(composed(f"recipe={recipe}"), arm, base)
    assert said in str(caught.value)


def test_a_setting_that_works_with_another_alone_is_no_part(composed: Any, tmp_path: Path) -> None:
    """growth_fraction says how long short windows and small batches last."""
    run = composed(*recipes(tmp_path / "own"))
    parts = parts_of(run, "both", "plain")
    assert parts.names == ["start_batch_size", "start_sequence_length"]
    assert [part.says for part in parts.each] == [
        "start_batch_size=2, without",
        "start_sequence_length=32, without",
    ]


def test_more_parts_than_arms_can_be_made_of_are_refused(composed: Any, tmp_path: Path) -> None:
    more = "learning_rate: 0.1, weight_decay: 0.2, steps: 3, batch_size: 2, max_grad_norm: 2.0,"
    text = RECIPE.replace("both: {", f"both: {{{more} compile: never, ")
    run = composed(*recipes(tmp_path / "own", text))
    with pytest.raises(UserError) as caught:
        parts_of(run, "both", "plain")
    assert "differs from plain in 8 parts" in str(caught.value)


# -- arms -----------------------------------------------------------------------------------------


def test_a_stage_is_left_out_by_reading_what_stands_before_it(composed: Any) -> None:
    run = composed("recipe=full")
    arms = Arms(run, parts_of(run, "student_int8", "baseline"))
    places = {each: arms.place(each) for each in coalitions(arms.parts.names)}
    found = {", ".join(sorted(each)): place for each, place in places.items()}
    read = {name: dict(stage.settings) for name, stage in arms.new.items()}
    known = dict(run.stages)

    def starts(arm: str) -> str:
        return read[arm]["model"] if arm in read else known[arm].model

    def teacher(arm: str) -> str:
        return read[arm]["teacher"] if arm in read else known[arm].teacher

    assert found[""].arm == "baseline"
    assert found["precision"].arm == "teacher"
    assert found["precision, student"].arm == "student"
    assert found["precision, student, student_int8"].arm == "student_int8"
    assert starts(found["precision, student_int8"].arm) == "teacher"
    assert starts(found["student_int8"].arm) == "baseline"
    plain = found["student"].arm
    assert teacher(plain) == "baseline"
    assert starts(found["student, student_int8"].arm) == plain
    # a student is cut from its teacher, which is a setting of the whole run
    assert found["student"].changes == {"student.source": "baseline"}
    assert found["precision, student"].changes == {}


def test_settings_are_left_out_one_by_one_and_arms_that_are_there_are_taken(
    composed: Any, tmp_path: Path
) -> None:
    run = composed(*recipes(tmp_path / "own"))
    arms = Arms(run, parts_of(run, "both", "plain"))
    small, short = (
        arms.place(frozenset({each})).arm for each in ("start_batch_size", "start_sequence_length")
    )
    assert small == "small"
    assert list(arms.new) == [short]
    settings = arms.new[short].settings
    assert (settings["start_batch_size"], settings["start_sequence_length"]) == (None, 32)
    assert settings["growth_fraction"] == 0.75


# -- the command ----------------------------------------------------------------------------------


def runs_in(root: Path) -> list[str]:
    return sorted(folder.name for folder in (root / "runs").iterdir())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose arm with short windows alone is missing."""
    cwd = tmp_path_factory.mktemp("attribute")
    done = here(cwd, *recipes(cwd / "own"), *TINY, *QUIET)
    assert done.returncode == 0, done.stderr
    return cwd


def work_h(kept: Any, arm: str) -> float:
    row = next(row for row in kept.result["rows"] if row["arm"] == arm)
    return row["ledger"]["device_hours"]["work"]["value"]


def test_parts_are_read_off_arms_that_exist_and_are_made_within_a_budget_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    root = place / "mlruns"
    before = runs_in(root)
    assert main(["latest"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Shapley values take the arms of all sets of parts. 1 of them does not exist yet" in said
    assert "1 run would make what is missing: add budget.device_hours=" in said
    assert runs_in(root) == before
    # without short windows there is an arm: its hours are known
    kept = read_kept(root / "latest")
    saved = 100 * (1 - work_h(kept, "both") / work_h(kept, "small"))
    shown = said.partition("start_sequence_length=32, without:")[2].partition("training: ")[2]
    times = shown.split()[0] if " times" in shown[:20] else None
    if times is None:
        assert shown.startswith(f"{saved:+.1f}%"), shown[:60]
    else:
        assert float(times) == pytest.approx(1 - saved / 100, rel=0.06)

    latest = (root / "latest").readlink()
    assert main(["latest", "budget.device_hours=0.000001"]) == 7
    told = capsys.readouterr()
    assert "budget.device_hours" in told.err
    assert "the same command with a larger budget.device_hours goes on" in told.out
    name = before[-1]
    assert main(["latest", "budget.device_hours=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Shapley values take" not in said
    assert said.count("its share of all, training:") == 2
    after = runs_in(root)
    assert len(after) == len(before) + 1  # the one that had stopped went on
    page = (root / "attribute" / f"{name}-both-plain/report.html").read_text()
    assert "start_sequence_length" in page
    assert "<script>alert" not in page

    assert main(["latest", "budget.device_hours=1"]) == 0
    assert runs_in(root) == after
    again = " ".join(capsys.readouterr().out.split())
    assert again.partition("what each part")[2] == said.partition("what each part")[2]
    assert (root / "latest").readlink() == latest  # what the user ran last

    made = next(iter((root / "runs").glob("*-attribute_*"))) / "result.json"
    result = json.loads(made.read_text())
    result["device"] |= {"name": "NVIDIA H200", "count": 8}
    made.write_text(json.dumps(result))
    assert main(["latest"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    together = said.partition("all together:")[2]
    assert "training: - (" in together  # the base's hours are another device's
    assert "ran on 1 x" in together
    assert "quality: - (" not in together


@pytest.mark.slow
def test_the_recipe_that_is_left_makes_the_arms_by_itself(place: Path) -> None:
    (recipe,) = (place / "mlruns/attribute").glob("*/recipes/*.yaml")
    done = here(
        place,
        "--recipe-dir",
        str(recipe.parent),
        f"recipe={recipe.stem}",
        *QUIET,
        "tracking.root=elsewhere",
        "tracking.charts=false",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((place / "elsewhere/latest/result.json").read_text())
    assert {row["arm"] for row in result["rows"]} == {"plain", "both", "small", "both_2"}


def test_how_the_process_began_is_paid_by_the_first_run_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs in one process: the second one's clock begins with it."""
    job = attribute.Job("recipe", {})
    done: list[Any] = []
    since: list[int] = []

    def make(*args: Any) -> int:
        since.append(args[-1])
        result = {"run": {"spent": {"value": 0.1}}}
        done.append(SimpleNamespace(result=result))
        return 0

    monkeypatch.chdir(place)
    monkeypatch.setattr(attribute, "jobs_of", lambda *_: [job, job])
    asked = count()  # before and after each of the two
    monkeypatch.setattr(attribute, "finished", lambda *_: done[-1] if next(asked) % 2 else None)
    monkeypatch.setattr(attribute, "make", make)
    before = time.monotonic_ns()
    assert main(["latest", "budget.device_hours=1"], 5) == 0
    assert since[0] == 5
    assert since[1] > before


def test_a_run_that_failed_has_paid_for_the_start_and_from_the_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.chdir(place)
    monkeypatch.setattr(attribute, "jobs_of", lambda *_: [attribute.Job("recipe", {})] * 2)
    monkeypatch.setattr(attribute, "finished", lambda *_: None)
    monkeypatch.setattr(attribute, "make", lambda *args: calls.append(args) or 1)
    before = time.monotonic_ns()
    assert main(["latest", "budget.device_hours=1"], 5) == 1
    (*_, first_h, first_ns), (*_, second_h, second_ns) = calls
    assert (first_h, first_ns) == (1.0, 5)
    assert second_h < 1.0
    assert second_ns > before


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["nowhere"], 1, "RUN: there is no run nowhere"),
        (["latest", "other"], 1, "RUN: 2 are named"),
        (["latest", "--arm", "x"], 1, "--arm: 'x' is no arm of this run"),
        (["latest", "--base", "both"], 1, "--arm: both and both do not differ"),
        (["latest", "budget.device_hours=soon"], 1, "'soon' is no number of hours"),
        (["latest", *["budget.device_hours=1"] * 2], 1, "budget.device_hours: is given twice"),
        (["latest", "budget.device_hours=nan"], 1, "'nan' is no number of hours"),
        (["latest", "--out"], 2, "--out: has no value"),
        (["latest", "--fast"], 2, "--fast: is no option of attribute"),
        (["latest", "training.steps=3"], 2, "training.steps=3: is no option of attribute"),
    ],
)
def test_bad_input_is_one_line(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(place)
    assert main(argv) == code
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_run_without_its_evidence_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(place / "mlruns/latest", tmp_path / "run")
    (copy / "evidence/compared.json").write_text("{}")
    assert main([str(copy)]) == 1
    assert "has no comparisons to read" in capsys.readouterr().err
    (copy / "journal.jsonl").write_text("")
    assert main([str(copy)]) == 1
    assert "journal.jsonl: it does not say when the run ended" in capsys.readouterr().err


@pytest.mark.slow
def test_stages_are_left_out_and_served_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Distillation and int8, each with and without the other."""
    monkeypatch.chdir(tmp_path)
    words = ["recipe=full", "~stages.student_bf16", "stages.student.allow_weak_teacher=true"]
    pairs = [
        "{arm: student, base: teacher, on: [quality, training, serving]}",
        "{arm: student_int8, base: teacher, on: [quality, serving]}",
        "{arm: student_int8, base: student, on: [serving]}",
    ]
    done = here(tmp_path, *words, f"compare=[{', '.join(pairs)}]", *TINY, *QUIET)
    assert done.returncode == 0, done.stderr
    assert main(["latest", "budget.device_hours=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "what each part of student_int8 brought, beside teacher:" in said
    assert "stage student (distill)" in said
    assert "stage student_int8 (quantize)" in said
    assert "serving: -" not in said.partition("what each part")[2].replace("serving: -0", "")
    newest = max((tmp_path / "mlruns/runs").iterdir())
    served = read_kept(newest).basis["served"]  # pyright: ignore[reportOptionalSubscript]
    assert served is not None
    arms = {(arm, base) for arm, base, *_ in served["seconds"]}
    assert {("student_int8_2", "teacher"), ("student_int8", "student_int8_2")} <= arms


@pytest.mark.slow
def test_what_has_no_effect_without_a_part_keeps_no_arm_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """decay_fraction says something of one schedule alone."""
    monkeypatch.chdir(tmp_path)
    own = "{schedule: constant_then_decay, decay_fraction: 0.3, learning_rate: 0.001}"
    text = RECIPE.replace("{model: base, start_batch_size: 2, growth_fraction: 0.75}", own)
    text = text.replace("primary_arm: both", "primary_arm: small").replace(
        "arm: both", "arm: small"
    )
    done = here(tmp_path, *recipes(tmp_path / "own", text), *TINY, *QUIET)
    assert done.returncode == 0, done.stderr
    assert main(["latest", "budget.device_hours=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("its share of all, training:") == 2
