"""Settings that would change nothing are refused where a user gave them, and only there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import main
from pipeline.cli.no_effect import NOTED, RULES, check_given, given_keys, recipe_keys, why_no_effect
from pipeline.cli.recipes import find_recipes
from pipeline.config.settings.ranges import dotted_keys
from pipeline.config.settings.run import Run
from pipeline.errors import UserError


@cache
def composed(*args: str) -> Any:
    taken: list[Any] = []
    more = ("candidate=a", "baseline=b") if args[0] == "recipe=release_check" else ()
    assert main([*args, *more], started_ns=0, execute=lambda run, *_: taken.append(run) or 0) == 0
    return taken[0]


REFUSED = [
    ("recipe=baseline", "student.layers", "without a stage that starts from the student"),
    ("recipe=baseline", "student.config", "without a stage that starts from the student"),
    ("recipe=baseline", "student", "without a stage that starts from the student"),
    ("recipe=baseline", "training.decay_fraction", "with schedule cosine"),
    ("recipe=distill", "stages.student.decay_fraction", "with schedule cosine"),
    (
        "recipe=baseline",
        "training.growth_fraction",
        "without start_batch_size or start_sequence_length",
    ),
    ("recipe=distill", "stages.teacher.growth_fraction", "without start_batch_size"),
    (
        "recipe=baseline training.checkpoint_every=5",
        "training.checkpoint_seconds",
        "beside checkpoint_every",
    ),
    ("recipe=baseline", "training.preempted_every_seconds", "without checkpoint_every=auto"),
    ("recipe=baseline", "precision.loss_scale", "unless a stage trains in fp16 or auto"),
    ("recipe=baseline", "precision.loss_tolerance", "unless a stage trains in auto"),
    ("recipe=distill", "precision.fp8_least_width", "unless a stage trains in fp8_tensorwise"),
    ("recipe=baseline", "policy", "in recipe=baseline; it is for recipe=release_check"),
    ("recipe=full", "policy.metrics.accuracy.margin", "in recipe=full"),
    ("recipe=quantize", "store.url", "in recipe=quantize"),
    ("recipe=baseline", "serving.volume", "where no pair of arms is compared on serving"),
    ("recipe=distill", "serving.draft_tokens", "without serving.draft"),
    ("recipe=baseline seeds=[1,2]", "seed", "beside seeds"),
    ("recipe=baseline", "allow_no_speedup", "without a quantize stage"),
    ("recipe=baseline", "cost.teacher_shared_by", "without a teacher"),
    ("recipe=release_check", "training.steps", "where no stage trains"),
    ("recipe=release_check", "model.shape.layers", "in a release check"),
    ("recipe=release_check", "precision", "where no stage trains"),
    (
        "recipe=distill",
        "stages.student.ramp_fraction",
        "without start_temperature or start_ce_weight",
    ),
    ("recipe=baseline", "data.columns", "on the embedded data"),
]
TAKEN = [
    ("recipe=distill", "student.layers"),
    ("recipe=baseline training.checkpoint_every=auto", "training.checkpoint_seconds"),
    ("recipe=distill", "student"),
    ("recipe=baseline", "serving.load.new"),
    ("recipe=baseline", "training.steps"),
    ("recipe=baseline training.schedule=constant_then_decay", "training.decay_fraction"),
    ("recipe=distill stages.teacher.schedule=constant_then_decay", "stages.teacher.decay_fraction"),
    ("recipe=baseline training.start_batch_size=8", "training.growth_fraction"),
    ("recipe=mixed_precision", "precision.loss_scale"),
    ("recipe=baseline precision=fp16", "precision.loss_scale"),
    ("recipe=baseline precision=auto", "precision.loss_tolerance"),
    ("recipe=baseline precision=fp8_rowwise", "precision.fp8_least_width"),
    ("recipe=release_check", "policy.alpha"),
    ("recipe=release_check", "store.url"),
    ("recipe=release_check", "training.sequence_length"),
    ("recipe=distill", "serving.load.new"),
    ("recipe=quantize_search", "serving.load.prompt"),
    ("recipe=quantize", "allow_no_speedup"),
    ("recipe=distill", "cost.teacher_shared_by"),
    ("recipe=baseline", "model.shape.layers"),
    ("recipe=distill stages.student.start_temperature=2", "stages.student.ramp_fraction"),
    ("recipe=baseline", "seed"),
    ("recipe=baseline", "tracking.team"),
    ("recipe=quantize_recover", "training.steps"),
]


@pytest.mark.parametrize(("line", "key", "why"), REFUSED)
def test_what_has_no_effect_is_refused_or_said(
    line: str, key: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = composed(*line.split())
    assert why in (why_no_effect(run, key) or "")
    if key.startswith(NOTED):  # how to measure what this recipe does not
        check_given(run, {key, "tracking.team"})
        assert f"note: {key} has no effect {why_no_effect(run, key)}\n" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match="has no effect") as refused:
        check_given(run, {key, "tracking.team"})
    assert refused.value.key == key


@pytest.mark.parametrize(("line", "key"), TAKEN)
def test_what_may_have_one_is_taken(line: str, key: str) -> None:
    assert why_no_effect(composed(*line.split()), key) is None


def test_a_model_that_is_given_has_its_shape_its_tokenizer_and_its_revision(tmp_path: Path) -> None:
    run = composed("recipe=distill")
    given = Run(**{name: getattr(run, name) for name in Run.__dataclass_fields__})
    given.model = type(run.model)(path=str(tmp_path))
    assert why_no_effect(given, "model.shape.heads") == "beside model.path"
    assert "whose tokenizer is used" in (why_no_effect(given, "data.vocabulary_size") or "")
    assert why_no_effect(given, "model.revision") == "with a local folder"
    given.model.path = "org/name"
    assert why_no_effect(given, "model.revision") is None


def test_every_setting_of_every_recipe_has_an_answer() -> None:
    for name in find_recipes([]):
        run = composed(f"recipe={name}")
        keys = [*dotted_keys(Run), *(key for stage in run.stages for key in stage_keys(run, stage))]
        answers = {key: why_no_effect(run, key) for key in keys}
        assert all(why is None or isinstance(why, str) for why in answers.values())
        assert 0 < sum(why is not None for why in answers.values()) < len(keys) / 2
    assert set(RULES) <= {*dotted_keys(Run)}


def stage_keys(run: Any, name: str) -> Iterator[str]:
    return dotted_keys(run.stages[name], f"stages.{name}.")


def test_only_what_was_given_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, or in a recipe of one's own; what ships sets more than a run may
    need.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline"])
    text = (
        "# Q\ndefaults: [/stage@stages.only: train]\nprimary_arm: only\ntraining: {{steps: 5{}}}\n"
    )
    for more, code in (
        ("", 0),
        (", decay_fraction: 0.3", 1),
        (", decay_fraction: 0.3, schedule: constant_then_decay", 0),
    ):
        (tmp_path / "mine.yaml").write_text(text.format(more))
        assert (
            main(["--recipe-dir", ".", "recipe=mine"], started_ns=0, execute=lambda *_: 0) == code
        )
    assert (
        "training.decay_fraction: has no effect with schedule cosine; leave it out"
        in capsys.readouterr().err
    )
    args = ["-m", "recipe=baseline", "precision=fp16,fp32", "precision.loss_scale=1024"]
    taken: list[str] = []
    assert (
        main(
            args, started_ns=0, execute=lambda run, *_: taken.append(run.precision.name.value) or 0
        )
        == 1
    )
    assert taken == ["fp16"]


def test_keys_are_read_from_lines_and_recipes() -> None:
    line = [
        "recipe=x",
        "a.b=1",
        "++student.config.c=2",
        "policy.alpha=null",
        "hydra.verbose=true",
        "+stage@stages.x=train",
    ]
    assert given_keys(line) == {"recipe", "a.b", "student.config.c"}
    settings = {
        "defaults": [1],
        "recipe": "x",
        "a": {"b": {"c": 1}, "d": None},
        "student": {"config": {"k": 1}},
        "e": [],
    }
    assert recipe_keys(settings) == {"a.b.c", "student.config", "e"}
