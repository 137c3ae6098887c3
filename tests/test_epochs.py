"""Epochs in place of steps: what wins over what, how many steps they are, and a run that takes
them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_distill_cached import TINY

from pipeline.cli.main import main
from pipeline.config.settings.run import Run
from pipeline.config.settings.training import TrainingConfig
from pipeline.errors import UserError
from pipeline.stages.distill import DistillStage
from pipeline.stages.settings import settle_epochs, steps_of, training_settings
from pipeline.stages.train import TrainStage
from pipeline.training.schedule import first_row


def run_of(**training: Any) -> Run:
    """Return a run as a recipe composes it: a profile's steps, and steps of one stage."""
    stages = {
        "teacher": TrainStage(steps=260),
        "student": DistillStage(),
        "control": TrainStage(like="student"),
        "as_it_is": TrainStage(steps=0),
    }
    return Run(training=TrainingConfig(**{"steps": 120, **training}), stages=stages)


def plan(run: Run, given: dict[str, Any]) -> dict[str, tuple[int, float | None]]:
    """Return steps and epochs in force by stage, once the command line's settings are in."""
    for key, value in given.items():
        owner, _, name = key.rpartition(".")
        setattr(
            run.training if owner == "training" else run.stages[owner.split(".")[1]], name, value
        )
    settle_epochs(run, given)
    found = {name: training_settings(stage, run) for name, stage in run.stages.items()}
    return {name: (settings.steps, settings.epochs) for name, settings in found.items()}


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        (
            {},
            {},
            {
                "teacher": (260, None),
                "student": (120, None),
                "control": (120, None),
                "as_it_is": (0, None),
            },
        ),
        (
            {},
            {"training.epochs": 3},
            {"teacher": (120, 3), "student": (120, 3), "control": (120, 3), "as_it_is": (0, None)},
        ),
        ({}, {"training.steps": 9}, {"teacher": (260, None), "student": (9, None)}),
        ({"epochs": 2}, {"training.steps": 9}, {"teacher": (260, None), "student": (9, None)}),
        ({"epochs": 2}, {}, {"teacher": (260, None), "student": (120, 2), "control": (120, 2)}),
        ({"steps": 0}, {"training.epochs": 1}, {"student": (1, 1)}),
        (
            {},
            {"training.epochs": 3, "stages.teacher.steps": 5},
            {"teacher": (5, None), "student": (120, 3)},
        ),
        ({}, {"stages.teacher.epochs": 0.5}, {"teacher": (120, 0.5), "student": (120, None)}),
        (
            {},
            {"training.steps": 9, "stages.student.epochs": 2},
            {"student": (9, 2), "control": (9, 2)},
        ),
        ({"epochs": 2}, {"stages.student.steps": 7}, {"student": (7, None), "control": (7, None)}),
    ],
)
def test_what_the_user_gives_wins_over_profile_and_recipe(
    recipe: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = plan(run_of(**recipe), given)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("owner", ["training", "stages.teacher"])
def test_both_from_the_user_are_refused(owner: str) -> None:
    with pytest.raises(
        UserError, match=rf"{owner}\.epochs: does not go with {owner}\.steps; give one of the two"
    ):
        settle_epochs(run_of(), {f"{owner}.steps", f"{owner}.epochs"})


def test_both_in_one_stage_of_a_recipe_are_refused_and_so_are_epochs_that_are_computed() -> None:
    run = run_of()
    stage = TrainStage(steps=3, epochs=1)
    with pytest.raises(UserError, match=r"stages\.x\.epochs: does not go with stages\.x\.steps"):
        stage.check("stages.x", run)
    stage = TrainStage(like="student", match_compute=True, epochs=1)
    with pytest.raises(
        UserError, match=r"stages\.x\.epochs: is computed where match_compute is set"
    ):
        stage.check("stages.x", run)


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({"epochs": 1, "batch_size": 16}, 160, 10),
        ({"epochs": 1, "batch_size": 16}, 161, 11),
        ({"epochs": 2.5, "batch_size": 16}, 160, 25),
        ({"epochs": 0.1, "batch_size": 16}, 30, 1),
        ({"epochs": 1e-9, "batch_size": 16}, 30, 1),
        ({"epochs": 0.07, "batch_size": 1}, 100, 7),  # 7.000000000000001 in binary
        ({"steps": 33, "batch_size": 16}, 160, 33),
    ],
)
def test_how_many_steps_epochs_are(settings: dict[str, Any], rows: int, steps: int) -> None:
    assert steps_of(TrainingConfig(**settings), rows) == steps


@pytest.mark.parametrize("start", [1, 2, 4, 8])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
def test_batches_that_grow_take_the_steps_that_read_all(start: int, fraction: float) -> None:
    """Nothing less than the epochs is read, and at most a few batches more."""
    for rows in (1, 15, 100, 1001):
        settings = TrainingConfig(
            epochs=2, batch_size=16, start_batch_size=start, growth_fraction=fraction
        )
        settings.steps = steps_of(settings, rows)
        assert 2 * rows <= first_row(settings.steps, settings) <= 2 * rows + 5 * 16


@pytest.mark.slow
def test_teacher_cache_and_student_agree_on_the_steps_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A capture holds what the epochs will read, a control that matches compute gets its own
    steps.
    """
    monkeypatch.chdir(tmp_path)
    args = [arg for arg in TINY if not arg.startswith(("training.steps", "stages.teacher.steps"))]
    assert main([*args, "training.epochs=0.05"], started_ns=0) == 0, capsys.readouterr().err
    result = json.loads(next(tmp_path.glob("mlruns/runs/*/result.json")).read_text())
    steps = {
        row["arm"]: row["ledger"]["counts"]["steps"]["value"]
        for row in result["rows"]
        if row["type"] != "capture"
    }
    said = [note for note in result["environment"]["notes"] if "student: 0.05 epochs of" in note]
    windows = int(said[0].split()[4])
    assert steps["student"] == steps["teacher"] == -(-windows * 5 // 400)  # of 4 windows
    assert said == [
        f"student: 0.05 epochs of {windows} windows of train are {steps['student']} steps"
    ]
    assert main([*args, "training.epochs=0.05"], started_ns=0) == 0
    assert capsys.readouterr().out.count("reused") >= 3
