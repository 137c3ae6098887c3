"""What a refusal advises is done, word for word, and must then be accepted."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
from few import few

from pipeline.cli.main import main


@pytest.fixture
def compose(capsys: pytest.CaptureFixture[str]) -> Any:
    """Compose a command line; return its run, or the line that refused it."""

    def compose(*args: str) -> Any:
        taken: list[Any] = []
        main(list(args), started_ns=0, execute=lambda run, *_: taken.append(run) or 0)
        said = capsys.readouterr().err.strip()
        assert taken or len(said.splitlines()) == 1
        return taken[0] if taken else said

    return compose


BLANKS = [
    ["training.learning_rate = 2e-4"],
    ["training.batch_size =4"],
    [" seed=3"],
    ["training .steps=7"],
    ["+training.steps = 7"],
    ["precision = fp32"],
    ["hardware.device = cpu"],
    ["tracking.experiment = a b"],
    ["seeds = [1, 2]"],
    ["data.columns = {text: body}", "data.path=."],
    ["stages.quantized.exclude = [lm_head]"],
    ["stages.quantized.format = nf4"],
    ["training.steps", "=", "7"],
    ["training.steps=", "7"],
    ["training.steps", "=7"],
    ["tracking.team\t=\tx"],
]
LISTS = [
    ["seeds=3 4"],
    ["seeds=[3,4"],
    ["seeds=3;4"],
    ["serving.batches=1,4"],
    ["serving.batches=2]"],
    ["stages.quantized.candidates=nf4 int8"],
    ["stages.quantized.candidates=int8"],
    ["stages.quantized.exclude=*.mlp.* lm_head"],
    ["stages.quantized.exclude=it's"],
]


@pytest.mark.parametrize("words", few([*BLANKS, *LISTS], 6))
def test_the_word_that_is_advised_is_accepted(compose: Any, words: list[str]) -> None:
    said = compose("recipe=quantize_search", *words)
    advised = re.search(r"(?:remove the blanks|quoted for the shell): (.+)$", said)
    assert advised is not None, said
    (word,) = shlex.split(advised.group(1))
    others = [each for each in words if each.startswith("data.path")]
    done = compose("recipe=quantize_search", word, *others)
    assert not isinstance(done, str), done


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("training.steps=[7", "training.steps: '[7' is not a whole number; give a whole number"),
        ("training.learning_rate=2e-4%", "'2e-4%' is not a number; give a number"),
        ("training.max_grad_norm=1 }", "'1 }' is not a number; give a number"),
        (
            "training.steps=3,4",
            "training.steps: has several values; add -m to run one job for each",
        ),
        ("training.steps=${seed", "cannot be parsed; close what it opens, or give a plain value"),
        ("seeds=x", "'x' is no list; give whole numbers in brackets: [1,8]"),
        (
            "stages.baseline.precisions = fp32",
            "has blanks in its name or around its =; write key=value, without",
        ),
        ("weight_decay = 0.1", "it is training.weight_decay=... here"),
        ("+nothing=1", "a + adds a setting, and nothing reads added ones; leave it out"),
        ("data.label_field=kind", "is no setting any more; give 'data.columns={label: kind}'"),
        (
            "stages.student.insist=true",
            "is no setting any more; give stages.student.allow_weak_teacher=true",
        ),
        ("distill", "distill: cannot be parsed; write recipe=distill"),
    ],
)
def test_no_word_is_advised_that_would_be_refused(compose: Any, word: str, said: str) -> None:
    line = compose("recipe=baseline", word)
    assert said in line
    assert "quote it twice" not in line


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            "recipe=baseline stages.student.temperature=2",
            "recipe=baseline has no stage 'student'; its stages: baseline",
        ),
        (
            "recipe=schedules stages.student.lr=3",
            "has no stage 'student'; its stages: plain, short_first, small_batches",
        ),
        (
            "recipe=quantize stages.int4.format=nf4",
            "has no stage 'int4'; did you mean int8? its stages: reference,",
        ),
        (
            "recipe=distill stages.teachr=5",
            "recipe=distill has no stage 'teachr'; did you mean teacher? its stages: ",
        ),
        (
            "recipe=distill ~stages.teachr",
            "~stages.teachr: recipe=distill has no stage 'teachr'; did you mean teacher?",
        ),
        (
            "-m recipe=distill,full stages.control_steps.steps=5",
            "recipe=full has no stage 'control_steps'; ",
        ),
        (
            "recipe=distill ~stages.control_steps stages.control_steps.steps=4",
            "~stages.control_steps leaves this stage",
        ),
        ("recipe=distill stages.student.wd=3", "it is stages.student.weight_decay=... here"),
        ("recipe=distill stages.student.tempratur=3", "did you mean stages.student.temperature?"),
    ],
)
def test_a_stage_that_a_recipe_does_not_place_is_said_to_be_absent(
    compose: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, args: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pipeline"])
    line = compose(*args.split())
    assert isinstance(line, str)
    assert said in line


def test_stages_of_recipes_that_build_on_others_are_known(compose: Any, tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# Mine?\ndefaults:\n  - distill\n  - /stage@stages.more: train\n  - _self_\n"
    )
    line = compose("--recipe-dir", str(tmp_path), "recipe=mine", "stages.nobody.steps=3")
    assert "its stages: teacher, student, control_steps, control_compute, more" in line
