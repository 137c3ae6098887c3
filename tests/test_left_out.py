"""`~stages.NAME` on a command line: what goes with a stage, what is refused, and that what is
advised then works.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from few import few

from pipeline.cli.main import main
from pipeline.cli.recipes import find_recipes, recipe_text

STAGES = [
    (name, stage)
    for name, recipe in find_recipes([]).items()
    for stage in re.findall(r"/stage@stages\.(\w+):", recipe_text(recipe))
]


@pytest.fixture
def compose(capsys: pytest.CaptureFixture[str]) -> Any:
    """Compose a command line; return its run (None where it is refused) and all that was said."""

    def compose(*args: str) -> tuple[Any, str]:
        taken: list[Any] = []
        main(list(args), started_ns=0, execute=lambda run, *_: taken.append(run) or 0)
        out, err = capsys.readouterr()
        assert "crashed" not in err
        return (taken or [None])[0], out + err

    return compose


@pytest.mark.parametrize(("recipe", "stage"), few(STAGES, 8))
def test_each_stage_goes_or_the_refusal_says_what_else_to_give(
    compose: Any, recipe: str, stage: str
) -> None:
    line = (
        f"recipe={recipe}",
        f"~stages.{stage}",
        *(("candidate=a", "baseline=b") if "release" in recipe else ()),
    )
    run, said = compose(*line)
    if run is None and "give as well" not in said:
        assert recipe in ("release_check", "baseline")
        return
    assert run is not None or len(said.splitlines()) == 1
    advised = said.strip().partition("give as well: ")[2]
    for way in advised.split(", or instead: "):  # one way, of no words, where nothing is refused
        words = re.sub(r" \(or [^)]*\)", "", way).split()
        run, said = compose(*line, *words)
        assert run is not None, (words, said)
        assert f"note: left out: {stage}" in said
        assert stage not in run.stages
        assert all(stage not in (pair.arm, pair.base) for pair in run.compare)


@pytest.mark.parametrize(
    ("line", "said", "left"),
    [
        ("recipe=distill ~stages.control_steps", "student against control_steps", 2),
        (
            "recipe=full ~stages.student_bf16",
            "student_bf16 against baseline, student_bf16 against student",
            5,
        ),
        (
            "recipe=quantize ~stages.bf16 ~stages.fp16",
            "bf16 against reference, fp16 against reference",
            4,
        ),
    ],
)
def test_comparisons_go_with_their_stage_and_no_others(
    compose: Any, line: str, said: str, left: int
) -> None:
    run, told = compose(*line.split())
    assert told.endswith(f"; with it go the comparisons {said}\n")
    assert len(run.compare) == left


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "recipe=schedules ~stages.stacked",
            (
                "primary_arm is stacked; give as well: primary_arm=plain (or short_first,"
                " small_batches_first, shallow)"
            ),
        ),
        (
            "recipe=full ~stages.student",
            (
                "stages.student_bf16.model is student, stages.student_int8.model is student; give"
                " as well: ~stages.student_bf16 ~stages.student_int8 primary_arm=baseline (or"
                " teacher), or instead: stages.student_bf16.model=base"
                " stages.student_int8.model=base"
            ),
        ),
        ("recipe=schedules ~stages.shallow student.source=shallow", "student.source is shallow"),
        ("recipe=distill_cached ~stages.capture", "or instead: stages.student.cache=null"),
        ("recipe=baseline ~stages.baseline", "no stage is left that makes a model; keep one"),
        (
            "recipe=release_check candidate=a baseline=b ~stages.baseline",
            "compares candidate and baseline; keep both",
        ),
    ],
)
def test_what_cannot_go_alone_is_refused_once(compose: Any, line: str, said: str) -> None:
    run, told = compose(*line.split())
    assert run is None
    assert said in told
