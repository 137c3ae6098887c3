"""Checkpoints as often as loses the least time."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from make_assess_models import tiny
from test_training_loop import batches_for, hooks, settings

from pipeline.cli.validate import validate
from pipeline.config.settings.precision import Precision, PrecisionConfig
from pipeline.config.settings.run import Run
from pipeline.errors import Preempted, UserError
from pipeline.ledger.phases import PhaseClock
from pipeline.stages.settings import check_training
from pipeline.stages.train import TrainStage
from pipeline.tasks.table import Task
from pipeline.training.cadence import Cadence, best_interval, fresh, said
from pipeline.training.loop import Progress, train
from pipeline.training.objective import Objective

CPU = torch.device("cpu")


@pytest.mark.parametrize(("mean_min", "published_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_the_interval_is_that_of_dalys_figures(mean_min: float, published_min: float) -> None:
    """Captions of his figures 3 to 5: a checkpoint takes 5 minutes."""
    digits = 1 if published_min < 10 else 0
    assert round(best_interval(5, mean_min), digits) == published_min


def test_the_interval_by_hand() -> None:
    """sqrt(2 * 5 * 1440) = 120, and 5 / 2880 is the square of 1 / 24."""
    assert best_interval(5, 1440) == pytest.approx(120 * (1 + 1 / 72 + 1 / 5184) - 5)
    # where a checkpoint takes longer than machines last, it is that
    assert best_interval(25, 10) == best_interval(20, 10) == 10


def lost(every_s: float, save_s: float, mean_s: float) -> float:
    """Return the time that work takes, as a multiple of itself: Daly's eq. 20, restart left out."""
    return mean_s / every_s * math.expm1((every_s + save_s) / mean_s)


@pytest.mark.parametrize("save_s", [0.5, 5.0, 60.0, 600.0])
def test_no_other_interval_loses_noticeably_less(save_s: float) -> None:
    mean_s = 3600.0
    best = best_interval(save_s, mean_s)
    least = min(lost(best * factor / 100, save_s, mean_s) for factor in range(20, 500))
    assert lost(best, save_s, mean_s) <= least * 1.0005
    assert lost(best / 3, save_s, mean_s) > least * 1.005


def simulated(every_s: float, save_s: float, mean_s: float, work_s: float) -> float:
    """Return how long work takes where machines are taken away at random."""
    draw = random.Random(1)
    now = done = 0.0
    ends = draw.expovariate(1 / mean_s)
    while done < work_s:
        step = min(every_s, work_s - done)
        if now + step + save_s <= ends:
            now, done = now + step + save_s, done + step
        else:  # what was computed since the last checkpoint is lost
            now = ends
            ends += draw.expovariate(1 / mean_s)
    return now


def test_simulated_losses_are_least_near_the_interval() -> None:
    save_s, mean_s = 20.0, 3600.0
    best = best_interval(save_s, mean_s)
    times = {
        factor: simulated(best * factor, save_s, mean_s, 2e7) for factor in (0.3, 0.8, 1, 1.25, 3)
    }
    assert times[1] < 1.005 * min(times.values())
    assert times[0.3] > 1.05 * times[1]
    assert times[3] > 1.05 * times[1]


AUTO: dict[str, Any] = {"checkpoint_every": "auto", "checkpoint_seconds": 15.0, "steps": 8}


# -- in the loop -----------------------------------------------------------------------------------


def trained(folder: Path, stop_after: int | None = None, **changes: Any) -> tuple[Progress, Any]:
    """Train on a clock on which a step takes 10 s by itself, and every reading 1 ms."""
    now, steps = [0], count(1)

    def passed(ns: int = 10**6) -> int:
        now[0] += ns
        return now[0]

    clock = PhaseClock(passed)

    model = tiny(Task.causal_lm)
    config = settings(**changes)
    progress = train(
        model,
        batches_for(config),
        Objective(model, Task.causal_lm, Precision.fp32, CPU, clock),
        settings=config,
        precision=PrecisionConfig(name=Precision.fp32),
        folder=folder,
        clock=clock,
        hooks=hooks(
            advance=lambda _, __: passed(10**10),
            should_stop=lambda: Preempted if next(steps) == stop_after else None,
        ),
    )
    return progress, model


def test_the_first_checkpoint_is_timed_and_the_next_follow_from_it(tmp_path: Path) -> None:
    """The first is due after 15 s, at step 2; it takes a few ms, so the next are due after every
    step.
    """
    progress, _ = trained(tmp_path, **AUTO, preempted_every_seconds=60.0)
    record = progress.checkpoints
    mean = record["seconds"] / record["count"]
    assert 0 < mean < 0.1
    assert record["every_s"] == pytest.approx(best_interval(mean, 60.0))
    assert record["count"] == 6  # after steps 2 to 7
    seldom, _ = trained(tmp_path / "seldom", **AUTO, preempted_every_seconds=1e9)
    assert seldom.checkpoints["count"] == 1


def test_a_training_that_goes_on_keeps_what_checkpoints_took(tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        trained(tmp_path, 4, **AUTO, preempted_every_seconds=60.0)
    progress, model = trained(tmp_path, **AUTO, preempted_every_seconds=60.0)
    # the last one before the stop is in the file without its own time
    assert progress.checkpoints["count"] == 2 + 3
    whole, wanted = trained(tmp_path / "whole", steps=8)
    assert whole.checkpoints["every_s"] is None
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_steps_and_seconds_decide_where_they_are_given() -> None:
    now = [0]
    by_steps = Cadence.of(settings(checkpoint_every=3), fresh(), lambda: now[0])
    assert [by_steps.is_due(step) for step in (1, 2, 3, 6)] == [False, False, True, True]
    by_time = Cadence.of(settings(checkpoint_seconds=5.0), fresh(), lambda: now[0])
    now[0] = 5 * 10**9
    assert not by_time.is_due(1)
    now[0] += 1
    assert by_time.is_due(1)
    by_time.saved(2.0)
    assert not by_time.is_due(2)
    assert by_time.record == {"count": 1, "seconds": 2.0, "every_s": None}


def test_the_row_says_where_the_interval_comes_from() -> None:
    config = settings(checkpoint_every="auto")
    assert said(fresh(), config) is None
    line = said({"count": 2, "seconds": 4.0, "every_s": 205.5}, config)
    assert line is not None
    for part in ("every 206 s", "one takes 2 s", "2 checkpoints", "every 3 h"):
        assert part in line


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("soon", "'soon' is not a whole number; give 1, 2, ..., auto or null"),
        (2.5, "'2.5' is not a whole number"),
        (True, "'True' is not a whole number"),
        (0, "0 is out of range"),
    ],
)
def test_what_is_no_interval_is_refused(value: Any, said: str) -> None:
    run = Run()
    run.training = replace(run.training, checkpoint_every=value)
    with pytest.raises(UserError) as error:
        validate(run)
    assert f"training.checkpoint_every: {said}" in str(error.value)
    with pytest.raises(UserError) as error:
        check_training(TrainStage(checkpoint_every=value), "stages.plain", Run())
    assert f"stages.plain.checkpoint_every: {said}" in str(error.value)
    for good in (None, "auto", 5):
        check_training(TrainStage(checkpoint_every=good), "stages.plain", Run())
